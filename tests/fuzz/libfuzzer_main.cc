// libFuzzer's entry points. CODISTILL_FUZZ_SEEDS names a folder to write the seeds to, and ends
// there.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "tests/fuzz/fuzz_target.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* const directory = std::getenv("CODISTILL_FUZZ_SEEDS");
  if (directory == nullptr) return 0;
  int number = 0;
  for (const std::string& seed : codistill::FuzzSeeds()) {
    const auto status = codistill::WriteFileAtomically(
        codistill::JoinPath(directory, absl::StrCat("seed-", number++)), seed);
    if (!status.ok()) {
      std::fprintf(stderr, "%s\n", status.ToString().c_str());
      std::exit(1);
    }
  }
  std::exit(0);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  codistill::FuzzOne({reinterpret_cast<const char*>(data), size});
  return 0;
}
