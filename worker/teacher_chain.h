#ifndef CODISTILL_WORKER_TEACHER_CHAIN_H_
#define CODISTILL_WORKER_TEACHER_CHAIN_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "common/tensor/tensor.h"
#include "worker/teacher_source.h"

namespace codistill {

// The recurrent state of one teacher, which its student keeps: what came back with the predictions
// for one batch goes with the question about the next. A gap, or the beginning of an epoch, starts
// from zeros. Not thread-safe.
class TeacherChain {
 public:
  // The state to send with `batch`; empty stands for zeros.
  std::vector<Tensor> Before(const TeacherBatch& batch) const {
    const bool follows =
        !batch.starts_epoch && generation_ == batch.generation && step_ + 1 == batch.step;
    return follows ? states_ : std::vector<Tensor>();
  }
  // The state that came back with the predictions for `batch`.
  void Set(const TeacherBatch& batch, std::vector<Tensor> states) {
    states_ = std::move(states);
    generation_ = batch.generation;
    step_ = batch.step;
  }
  void Reset() { *this = TeacherChain(); }

 private:
  std::vector<Tensor> states_;  // after (generation_, step_)
  uint64_t generation_ = 0;     // of the student
  int64_t step_ = -1;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_CHAIN_H_
