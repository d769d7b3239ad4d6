#ifndef CODISTILL_COMMON_MODEL_TESTING_SAME_PREDICTIONS_H_
#define CODISTILL_COMMON_MODEL_TESTING_SAME_PREDICTIONS_H_

#include <cstdint>
#include <memory>
#include <string>

#include "common/model/model.h"
#include "common/tensor/tensor.h"

// For tests: whether two ways to run an archive say the same. Differences fail the test that calls.
namespace codistill {

// An archive of a small network, with what Load needs to know of it.
struct TestedArchive {
  std::string folder;
  std::string path;
  ModelConfig config;
};
TestedArchive ResNetForTest();  // 3 x 32 x 32, 10 classes
TestedArchive LstmForTest();    // 4 tokens of 30, two layers of 16 with their states

// Null, and a failed test, if it does not load.
std::unique_ptr<Model> LoadForTest(const TestedArchive& archive, bool optimize_predict);

// Multiplies all weights and buffers.
void ScaleWeights(const Model& model, float by);

void ExpectNear(const Tensor& got, const Tensor& want);

// Of so many images that depend on `seed`.
void ExpectSameOfImages(const Model& got, const Model& want, int64_t rows, uint64_t seed);

// Of sequences in three threads at once, each of which carries its states along.
void ExpectSameOfSequences(const Model& got, const Model& want);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_TESTING_SAME_PREDICTIONS_H_
