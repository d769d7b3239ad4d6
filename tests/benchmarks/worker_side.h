#ifndef CODISTILL_TESTS_BENCHMARKS_WORKER_SIDE_H_
#define CODISTILL_TESTS_BENCHMARKS_WORKER_SIDE_H_

#include <signal.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "tests/integration/job_harness.h"

namespace codistill {

inline constexpr int kServerCore = 0;
inline constexpr int kWorkerCore = 1;
inline constexpr int kWarmSteps = 3;  // after a pause, before the clock

// What a turn of either side took.
struct Turn {
  double seconds = 0;                   // of the measured steps, by the clock
  double processor_seconds_a_step = 0;  // of core 1, all steps of the turn
};

// A job of one group, one shard and one worker, each on a core of its own; prediction servers, if
// it has any, share the shard's. Paused and stopped except while it is measured.
class WorkerSide {
 public:
  // `pinned`: else they may run on every core.
  explicit WorkerSide(const JobConfig& job, bool pinned = true) : pinned_(pinned), harness_(job) {}

  // Before Start: further flags of the worker.
  void AddWorkerFlags(std::vector<std::string> flags) {
    harness_.AddFlags("alpha.worker.0", std::move(flags));
  }
  // Starts the daemons and trains at least 2 * kWarmSteps steps.
  absl::Status Start(const std::string& data_dir);
  std::string job_file() const { return harness_.directory().job(); }

  // Trains until `steps` more than a few have been committed; measures those, by the leader's
  // clock.
  absl::StatusOr<Turn> Run(int steps);

  // Drains the daemons, which then write their traces.
  absl::Status End() {
    Signal(SIGCONT);
    return harness_.Drain();
  }

  // Of every step so far.
  const std::map<int64_t, double>& losses() const { return losses_; }
  // What the worker says of itself.
  absl::StatusOr<WorkerCounters> Counters();
  // Time of the training thread so far that went into waiting for teachers, and into everything.
  struct ThreadSeconds {
    double teacher = 0;
    double all = 0;
  };
  absl::StatusOr<ThreadSeconds> Seconds();

 private:
  std::string Leader() const { return harness_.member("alpha.shard.0").address; }
  void Signal(int signal);
  // Pauses after the steps in hand and takes both daemons off their cores.
  absl::Status Rest();
  absl::Status ReadHistory();

  const bool pinned_;
  JobHarness harness_;
  std::map<int64_t, double> losses_;
  std::map<int64_t, double> seconds_;  // when each step was committed
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_WORKER_SIDE_H_
