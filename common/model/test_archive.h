#ifndef CODISTILL_COMMON_MODEL_TEST_ARCHIVE_H_
#define CODISTILL_COMMON_MODEL_TEST_ARCHIVE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "common/tensor/tensor.h"

namespace codistill {

// Runs models/export.py into a new folder of TEST_TMPDIR and returns that folder, which then holds
// NAME.pt, NAME.safetensors and NAME.tensors.textproto. Ends the test program with the exporter's
// output if it fails.
std::string ExportForTest(const std::string& name, const std::string& module,
                          const std::vector<std::string>& options, uint64_t seed = 1);

// The same for a module given as Python source with build(options).
std::string ExportSourceForTest(const std::string& name, const std::string& source);

// A contiguous FP32 or INT64 tensor of the given values.
Tensor FloatTensor(std::vector<int64_t> shape, const std::vector<float>& values);
Tensor Int64Tensor(std::vector<int64_t> shape, const std::vector<int64_t>& values);

// Values in [-1, 1) that depend on `seed` only.
Tensor RandomFloats(std::vector<int64_t> shape, uint64_t seed);

// As RandomFloats, of the shape and type (FP32 or BF16) of `logits`: the same values in either
// type.
Tensor RandomGradient(const Tensor& logits, uint64_t seed);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_TEST_ARCHIVE_H_
