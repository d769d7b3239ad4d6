// Tries the seeds of a fuzz target, files given as arguments (findings of the past), and mutations
// of the seeds that are the same in every run.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "common/base/file.h"
#include "common/base/random.h"
#include "tests/fuzz/fuzz_target.h"

namespace codistill {
namespace {

constexpr int kMutations = 4000;

void Mutate(RandomStream* random, const std::vector<std::string>& seeds, std::string* input) {
  const uint64_t changes = 1 + random->Below(4);
  for (uint64_t i = 0; i < changes; ++i) {
    const size_t at = input->empty() ? 0 : random->Below(input->size());
    switch (random->Below(6)) {
      case 0:  // one bit
        if (!input->empty()) (*input)[at] ^= static_cast<char>(1 << random->Below(8));
        break;
      case 1:  // one byte
        if (!input->empty()) (*input)[at] = static_cast<char>(random->Below(256));
        break;
      case 2:  // cut short
        input->resize(at);
        break;
      case 3:  // a hole
        input->erase(at, 1 + random->Below(16));
        break;
      case 4:  // a stretch twice
        input->insert(at, input->substr(at, 1 + random->Below(32)));
        break;
      case 5: {  // a stretch of another
        const std::string& other = seeds[random->Below(seeds.size())];
        if (other.empty()) break;
        const size_t from = random->Below(other.size());
        input->insert(at, other.substr(from, 1 + random->Below(64)));
        break;
      }
    }
  }
}

int Main(int argc, char** argv) {
  const std::vector<std::string> seeds = FuzzSeeds();
  if (seeds.empty()) {
    std::fprintf(stderr, "the target has no seeds\n");
    return 1;
  }
  for (const std::string& seed : seeds) FuzzOne(seed);
  FuzzOne("");
  for (int i = 1; i < argc; ++i) {
    const auto input = ReadFile(argv[i], size_t{16} << 20);
    if (!input.ok()) {
      std::fprintf(stderr, "%s\n", input.status().ToString().c_str());
      return 1;
    }
    FuzzOne(*input);
  }
  RandomStream random(1);
  for (int i = 0; i < kMutations; ++i) {
    std::string input = seeds[random.Below(seeds.size())];
    Mutate(&random, seeds, &input);
    FuzzOne(input);
  }
  std::printf("%zu seeds, %d files, %d mutations: no finding\n", seeds.size(), argc - 1,
              kMutations);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
