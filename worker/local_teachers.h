#ifndef CODISTILL_WORKER_LOCAL_TEACHERS_H_
#define CODISTILL_WORKER_LOCAL_TEACHERS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "proto/job.pb.h"
#include "worker/teacher_source.h"

namespace codistill {

// Teacher predictions that the worker computes itself, of models it follows in the background
// (codistillation.mode CHECKPOINTS; the way of Anil et al. 2018, section 2.1). No prediction
// servers.
//
// Announced batches are computed in order on a thread of this class, each by every teacher, with
// the version that is held at that moment. Take waits for the passes its batch still needs: they
// are the step's own compute. It does not wait like that for a teacher that is failing: one that
// has nothing loaded yet, whose version is more than max_staleness_steps behind its group, or whose
// pass ends with an error. Such a teacher is tried again every 20 ms; for its predictions Take
// waits up to teacher_wait_ms (under SKIP 0 unless the job says otherwise), and then it is a
// failure, counted once a batch, and under FAIL an error.
//
// What was computed with weights of a generation that its group has left is computed again.
// Recurrent teachers: the state after one batch goes into the next, as TeacherClient has it; of one
// that has left a generation all batches still to come are computed again, in order, from zeros.
class LocalTeachers : public TeacherSource {
 public:
  struct Teacher {
    std::string name;
    std::shared_ptr<FollowedModel> model;
  };
  struct Options {
    std::vector<Teacher> teachers;
    ModelConfig model;
    CodistillationConfig codistillation;
    Metrics* metrics = nullptr;  // optional, not owned
    // Held while a pass is computed, so that it does not compete with the student's for the threads
    // they share (see TakeTurns). Optional, not owned.
    Mutex* turn = nullptr;
  };

  // INVALID_ARGUMENT: no teachers.
  static absl::StatusOr<std::unique_ptr<LocalTeachers>> Create(Options options);
};

// `model` (not owned) with each Forward and Backward under `turn` (not owned): with training's
// passes and the teachers' one at a time, a worker computes on worker_threads threads, not on twice
// as many.
std::unique_ptr<Model> TakeTurns(Model* model, Mutex* turn);

}  // namespace codistill

#endif  // CODISTILL_WORKER_LOCAL_TEACHERS_H_
