#ifndef CODISTILL_WORKER_TEACHER_SOURCE_H_
#define CODISTILL_WORKER_TEACHER_SOURCE_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"

namespace codistill {

// One batch as teachers see it.
struct TeacherBatch {
  // Identity. Predictions are used only for the batch whose generation, step and example ids they
  // were made for, so that a replayed step or a reshuffled epoch cannot meet another batch's
  // predictions.
  uint64_t generation = 0;  // of the student's group
  int64_t step = 0;         // of the student
  uint64_t example_hash = 0;

  std::vector<Tensor> inputs;  // in the order of the job's model.inputs
  Tensor example_ids;          // INT64 [examples]; may be empty
  int64_t examples = 0;
  int64_t rows = 0;  // of the logits: examples x labels an example
  // The batch begins a text: recurrent teachers start from zeros.
  bool starts_epoch = false;

  bool SameAs(const TeacherBatch& other) const {
    return generation == other.generation && step == other.step &&
           example_hash == other.example_hash;
  }
};

// What one teacher said of the classes it finds likeliest.
struct TopKPrediction {
  Tensor index;  // INT32 [rows, k], different classes of [0, num_outputs)
  Tensor value;  // fp32 [rows, k], their probabilities at codistillation.temperature
  Tensor tail;   // fp32 [rows], of all other classes together

  bool empty() const { return index.empty(); }
};

// What the teachers said of one batch.
struct TeacherPredictions {
  // Of those that answered in time: [rows, num_outputs] logits, fp32 or in the 16-bit floats in
  // which they came, or the likeliest classes. None at all = go on without.
  std::vector<Tensor> logits;
  std::vector<TopKPrediction> top_k;
  size_t teachers() const { return logits.size() + top_k.size(); }
  // Of the stalest of them: newest step its group had committed when it answered, minus the step of
  // the weights that answered.
  int64_t staleness_steps = 0;
  // Student steps between the (earliest) answer and now.
  int64_t prefetch_lag_steps = 0;
};

// Where a worker's teacher predictions come from. What happens when they are late or do not come is
// the source's business (codistillation.on_teacher_loss); a caller of Take sees predictions, none,
// or an error that ends training. Thread-safe: batches are announced by the thread that builds them
// and taken by the one that trains.
class TeacherSource {
 public:
  // As TeacherCounters in proto/parameter_server.proto.
  struct Counts {
    int64_t requests = 0;
    int64_t failures = 0;
    int64_t refused = 0;
    int64_t hedged = 0;
    int64_t late = 0;
  };
  struct Counters : Counts {  // over all teachers
    int64_t outstanding = 0;  // now
    std::string last_error;   // of the newest failure, naming teacher and address
    // By teacher, with its name. Empty where a source does not tell teachers apart.
    std::vector<std::pair<std::string, Counts>> teachers;
  };

  virtual ~TeacherSource() = default;

  // Announces a batch that will be taken, in the order of the steps. Never waits. A batch announced
  // before is not asked for again.
  virtual void Request(const TeacherBatch& batch) = 0;

  // Says which step the student is at, for prefetch_lag_steps.
  virtual void BeginStep(int64_t step) = 0;

  // The predictions for a batch, announced or not; waits as the job allows. Older batches are
  // forgotten. An error (policy FAIL) names the teacher that was missing.
  virtual absl::StatusOr<TeacherPredictions> Take(const TeacherBatch& batch) = 0;

  // Forgets every announced batch and all recurrent state: the student's group was restored.
  virtual void Reset() = 0;

  // From now on Take does not wait (the worker is leaving).
  virtual void StopWaiting() = 0;

  virtual Counters counters() const = 0;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_SOURCE_H_
