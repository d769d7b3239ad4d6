#ifndef CODISTILL_TESTS_FUZZ_FUZZ_TARGET_H_
#define CODISTILL_TESTS_FUZZ_FUZZ_TARGET_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"

// What each fuzz target defines. Two mains drive it: libFuzzer's (tests/fuzz/run.sh) and, with all
// tests, one that tries the seeds and some thousand mutations of them, always the same.
namespace codistill {

// Well-formed inputs to begin from.
std::vector<std::string> FuzzSeeds();

// Tries one input. Whatever it is, this returns; a finding is a crash, a sanitizer's report, or a
// CHECK of ours that fails.
void FuzzOne(absl::string_view input);

}  // namespace codistill

#endif  // CODISTILL_TESTS_FUZZ_FUZZ_TARGET_H_
