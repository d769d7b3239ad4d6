#ifndef CODISTILL_WORKER_TRAINER_HARNESS_H_
#define CODISTILL_WORKER_TRAINER_HARNESS_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/client/leader_client.h"
#include "proto/job.pb.h"
#include "worker/batch_source.h"
#include "worker/teacher_source.h"
#include "worker/testing/fake_group.h"
#include "worker/testing/linear_model.h"
#include "worker/trainer.h"
#include "worker/worker_progress.h"

// For tests: a trainer with a linear model, made-up examples and a fixed teacher, in a FakeGroup.
namespace codistill {

inline constexpr int64_t kInputs = 4;
inline constexpr int64_t kOutputs = 3;
inline constexpr int64_t kBatch = 5;
inline constexpr int64_t kEpoch = 30;  // examples: six batches
inline constexpr int64_t kSteps = 16;

// True as soon as `condition` holds; false when it has not for 20 seconds.
bool Eventually(const std::function<bool()>& condition);

// Input `i` of an example, and its class.
float InputOf(uint64_t example, int64_t i);
int64_t LabelOf(uint64_t example);

// Examples in their own order, an epoch of kEpoch after the other.
class PlainBatches : public BatchSource {
 public:
  absl::StatusOr<StudentBatch> Build(uint64_t first, int64_t count) override;

  uint64_t bad_from = std::numeric_limits<uint64_t>::max();  // first example of a bad record
  int64_t extra_rows = 0;
};

// Says the same of every batch: logits that favour class 0; as a test wants it otherwise.
// Thread-safe, but for what a test sets beforehand.
class FixedTeacher : public TeacherSource {
 public:
  void Request(const TeacherBatch& batch) override;
  void BeginStep(int64_t) override {}
  absl::StatusOr<TeacherPredictions> Take(const TeacherBatch& batch) override;
  void Reset() override;
  void StopWaiting() override {}
  Counters counters() const override;

  // Steps asked for and taken, in order.
  std::vector<int64_t> requested() const;
  std::vector<int64_t> taken() const;
  int resets() const;
  // Steps asked for while a Reset was under way, which may forget them.
  size_t forgotten() const;

  absl::Status error;
  absl::Duration reset_time;
  int64_t silent_from = 0, silent_to = 0;
  int64_t diverged_at = -1;
  bool top_k = false;         // the same as the two likeliest classes
  int64_t malformed_at = -1;  // of top_k: a class is named twice

 private:
  mutable Mutex mu_;
  std::vector<int64_t> requested_ ABSL_GUARDED_BY(mu_);
  std::vector<int64_t> taken_ ABSL_GUARDED_BY(mu_);
  std::vector<uint64_t> generations_ ABSL_GUARDED_BY(mu_);
  int resets_ ABSL_GUARDED_BY(mu_) = 0;
  size_t forgotten_ ABSL_GUARDED_BY(mu_) = 0;
  Counters counters_ ABSL_GUARDED_BY(mu_);
};

// kSteps steps of kBatch examples with rate 0.5, without codistillation.
JobConfig Job();

void EnableCodistillation(int64_t burn_in, JobConfig* job);

// One worker of a FakeGroup.
struct TestWorker {
  explicit TestWorker(JobConfig the_job, bool recurrent = false, float noise = 0);

  std::unique_ptr<Trainer> MakeTrainer();
  absl::Status Run() { return MakeTrainer()->Run(); }

  JobConfig job;
  LinearModel model;
  PlainBatches batches;
  TeacherSource* teachers = nullptr;
  WorkerProgress progress{nullptr};
  std::unique_ptr<FakeGroup> group;
  std::unique_ptr<LeaderClient> leader;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TRAINER_HARNESS_H_
