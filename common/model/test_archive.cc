#include "common/model/test_archive.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

std::string NewFolder() {
  std::string path = absl::StrCat(testing::TempDir(), "/archive.XXXXXX");
  if (mkdtemp(path.data()) == nullptr) {
    std::perror(path.c_str());
    std::abort();
  }
  return path;
}

void Export(const std::string& folder, const std::string& name, const std::string& module,
            const std::vector<std::string>& options, uint64_t seed) {
  // -B: the exporter's folder is an input of the test, where nothing may be written.
  std::string command = absl::StrCat("/usr/bin/python3 -B models/export.py --module '", module,
                                     "' --seed ", seed, " --out '", folder, "/", name, "'");
  for (const std::string& option : options) absl::StrAppend(&command, " --option '", option, "'");
  if (std::system(absl::StrCat(command, " >'", folder, "/log' 2>&1").c_str()) != 0) {
    std::ifstream log(folder + "/log");
    const std::string text{std::istreambuf_iterator<char>(log), {}};
    std::fprintf(stderr, "%s failed:\n%s\n", command.c_str(), text.c_str());
    std::abort();
  }
}

template <typename T>
Tensor Filled(DataType dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
  Tensor tensor = Tensor::Allocate(dtype, std::move(shape));
  if (tensor.elements() != static_cast<int64_t>(values.size())) std::abort();
  std::copy(values.begin(), values.end(), static_cast<T*>(tensor.data()));
  return tensor;
}

}  // namespace

std::string ExportForTest(const std::string& name, const std::string& module,
                          const std::vector<std::string>& options, uint64_t seed) {
  std::string folder = NewFolder();
  Export(folder, name, module, options, seed);
  return folder;
}

std::string ExportSourceForTest(const std::string& name, const std::string& source) {
  std::string folder = NewFolder();
  const std::string file = folder + "/module_under_test.py";
  std::ofstream(file) << source;
  Export(folder, name, file, {}, 1);
  return folder;
}

Tensor FloatTensor(std::vector<int64_t> shape, const std::vector<float>& values) {
  return Filled(DT_FLOAT, std::move(shape), values);
}

Tensor Int64Tensor(std::vector<int64_t> shape, const std::vector<int64_t>& values) {
  return Filled(DT_INT64, std::move(shape), values);
}

Tensor RandomFloats(std::vector<int64_t> shape, uint64_t seed) {
  Tensor tensor = Tensor::Allocate(DT_FLOAT, std::move(shape));
  std::mt19937_64 engine(seed);
  for (float& value : tensor.As<float>()) {
    value = static_cast<float>(engine() >> 40) / (1 << 23) - 1;
  }
  return tensor;
}

Tensor RandomGradient(const Tensor& logits, uint64_t seed) {
  Tensor floats = RandomFloats(logits.shape(), seed);
  Tensor gradient = Tensor::Allocate(logits.dtype(), logits.shape());
  for (int64_t i = 0; i < floats.elements(); ++i) {
    // A bfloat16 is the upper half of a float.
    uint32_t bits = 0;
    std::memcpy(&bits, &floats.As<float>()[i], sizeof(bits));
    const auto upper = static_cast<uint16_t>(bits >> 16);
    bits = uint32_t{upper} << 16;
    if (logits.dtype() == DT_BFLOAT16) {
      static_cast<uint16_t*>(gradient.data())[i] = upper;
    } else {
      std::memcpy(&gradient.As<float>()[i], &bits, sizeof(bits));
    }
  }
  return gradient;
}

}  // namespace codistill
