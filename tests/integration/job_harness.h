#ifndef CODISTILL_TESTS_INTEGRATION_JOB_HARNESS_H_
#define CODISTILL_TESTS_INTEGRATION_JOB_HARNESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/client/tensor_client.h"
#include "control/fleet.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "tests/integration/weights.h"

namespace codistill {

// How long a test waits for anything. Far more than anything takes: two busy cores must not fail a
// test.
inline constexpr absl::Duration kPatience = absl::Seconds(120);

// A job that trains in a second or two: an MLP on the synthetic task. Groups are called alpha,
// beta, gamma; each has two shards (the first layer is large enough to be cut over both) and one
// worker. Codistillation waits for its teachers, so that every step after burn-in uses them. Tests
// change what they are about.
JobConfig MlpJob(const std::string& name, int num_groups);

// A directory of its own under TEST_TMPDIR.
std::string NewDirectory(const std::string& name);

// Binaries of this build, from the test's runfiles.
BinaryPaths RunfilesBinaries();
std::string RunfilesPath(const std::string& path);  // of a file from the root, absolute

// Makes the job's archives (models/export.py) once in this process for every different model, seed
// and list of groups, and turns model.export into model.archive_dir.
absl::Status ExportArchives(JobConfig* job);

// A job's real daemons, as children of this process over loopback. Everything that waits looks
// after the daemons meanwhile: one that is lost, or a group that fails, ends the wait with an error
// that has the end of its log. Daemons that still run are killed by the destructor. For the main
// thread.
class JobHarness {
 public:
  // `restart`: a daemon that a signal killed is started again, as `codistillctl run --restart`
  // does.
  explicit JobHarness(JobConfig job, bool restart = false);

  // Before Start: other binaries than this build's; where the job's files are (default: the run's
  // own directory).
  void set_binaries(BinaryPaths binaries) { binaries_ = std::move(binaries); }
  void set_data_dir(std::string data_dir) { data_dir_ = std::move(data_dir); }
  // Further flags of every daemon, and how often one may be started again.
  void set_flags(std::vector<std::string> flags) { flags_ = std::move(flags); }
  void set_max_restarts(int restarts) { max_restarts_ = restarts; }
  // Further flags of one daemon.
  void AddFlags(const std::string& name, std::vector<std::string> flags) {
    flags_of_[name] = std::move(flags);
  }

  // Exports, validates, starts. OK once every daemon is ready.
  absl::Status Start();

  Fleet& fleet() { return *fleet_; }
  const JobConfig& job() const { return job_; }
  const RunDirectory& directory() const { return directory_; }

  // By name: "alpha.shard.0", "beta.prediction.0", "alpha.worker.1", "evaluator".
  const FleetMember& member(const std::string& name) const;
  // kill -9.
  void Kill(const std::string& name);

  GroupRef Ref(int group) const;
  absl::StatusOr<GetHistoryReply> History(int group);
  absl::StatusOr<DaemonStatus> StatusOf(const std::string& name);
  // With the shard map.
  absl::StatusOr<GroupState> State(int group);

  // Calls `done` until it says true. `what` is awaited, for the error.
  absl::Status WaitFor(const std::string& what, const std::function<absl::StatusOr<bool>()>& done);
  absl::Status WaitForStep(int group, int64_t step);
  // Every group FINISHED, every worker and the evaluator ended with code 0.
  absl::Status WaitUntilDone();

  absl::StatusOr<Weights> Pull(int group, TensorClient::Source source, int64_t step);
  // The newest cut; after WaitUntilDone, the final weights.
  absl::StatusOr<Weights> NewestCut(int group);
  // Start, WaitUntilDone, NewestCut of group 0, Drain.
  absl::StatusOr<Weights> TrainToEnd();

  // Clean end of everything: OK if every daemon exited with code 0.
  absl::Status Drain() { return fleet_->Drain(absl::Seconds(60)); }

 private:
  absl::Status Look();

  JobConfig job_;
  const bool restart_;
  RunDirectory directory_;
  BinaryPaths binaries_;
  std::string data_dir_;
  std::vector<std::string> flags_;
  int max_restarts_ = 20;
  std::map<std::string, std::vector<std::string>> flags_of_;
  std::unique_ptr<Fleet> fleet_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_JOB_HARNESS_H_
