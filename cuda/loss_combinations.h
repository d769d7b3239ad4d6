// A fixed list of combinations of what the loss can be asked for, with a batch for each: what tests
// of the kernels against the reference and against libtorch go through.

#ifndef CODISTILL_CUDA_LOSS_COMBINATIONS_H_
#define CODISTILL_CUDA_LOSS_COMBINATIONS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/loss.h"

namespace codistill {

struct LossCombination {
  struct Dense {
    DenseTeacher::Kind kind;
    NumberFormat format;
  };

  std::string name;
  LossOptions options;
  bool prior = false;    // smoothed towards a unigram prior
  bool weights = false;  // rows have weights, one of them 0
  NumberFormat logits_format = NumberFormat::kFloat32;
  std::vector<Dense> teachers;
  std::vector<int64_t> topk_teachers;  // k of each; 0: all classes
};

// About 200: every phi with every psi at three temperatures and with every kind of smoothing, the
// teachers' formats and numbers, weights, ignored labels and bfloat16 taking turns.
std::vector<LossCombination> AllLossCombinations();

// Numbers rounded to `format` and stored in it. kInt8 is not for this.
std::vector<char> Encode(const std::vector<float>& values, NumberFormat format);

// A teacher with its arrays: `values` (logits, or probabilities) in `format`. kInt8 gets a scale a
// row.
struct EncodedTeacher {
  std::vector<char> bytes;
  std::vector<float> scale;
  DenseTeacher view;

  EncodedTeacher(const std::vector<float>& values, int64_t rows, int64_t classes,
                 DenseTeacher::Kind kind, NumberFormat format);
  EncodedTeacher(const EncodedTeacher&) = delete;
};

// softmax(x / temperature) of every row; with `binary`, sigmoid(x / temperature) of every element.
std::vector<float> ProbabilitiesOf(const std::vector<float>& logits, int64_t rows, int64_t classes,
                                   double temperature, bool binary);

// Everything that a combination's inputs point to, random. Not to be moved.
class CombinationBatch {
 public:
  // Logits have the deviation `spread`.
  CombinationBatch(const LossCombination& combination, int64_t rows, int64_t classes, double spread,
                   uint64_t seed);
  CombinationBatch(const CombinationBatch&) = delete;

  const LossInputs& inputs() const { return inputs_; }

 private:
  struct TopK {
    std::vector<int32_t> index;
    std::vector<float> value, tail;
  };
  void AddTopK(const std::vector<float>& probabilities, int64_t k);

  LossInputs inputs_;
  std::vector<char> logits_;
  std::vector<int64_t> labels_;
  std::vector<float> targets_, prior_, weights_;
  std::vector<std::unique_ptr<EncodedTeacher>> teachers_;
  std::vector<std::unique_ptr<TopK>> top_k_;
  std::vector<DenseTeacher> dense_views_;
  std::vector<TopKTeacher> topk_views_;
};

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_COMBINATIONS_H_
