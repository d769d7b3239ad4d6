#ifndef CODISTILL_CONTROL_FLEET_H_
#define CODISTILL_CONTROL_FLEET_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "control/child_process.h"
#include "proto/job.pb.h"

namespace codistill {

// Where the binaries are. Found beside codistillctl, or in its Bazel output tree.
struct BinaryPaths {
  std::string parameter_server;
  std::string prediction_server;
  std::string worker;

  static BinaryPaths Find();
};

// Files of one run.
struct RunDirectory {
  std::string root;
  std::string job() const { return root + "/job.textproto"; }
  std::string models() const { return root + "/model"; }
  std::string checkpoints() const { return root + "/checkpoints"; }
  std::string logs() const { return root + "/logs"; }
  std::string traces() const { return root + "/trace"; }
  std::string ready() const { return root + "/run"; }
  std::string evaluation() const { return root + "/run/evaluation.json"; }
  std::string summary() const { return root + "/summary.json"; }
  std::string metrics() const { return root + "/metrics.csv"; }
  std::string report() const { return root + "/report.html"; }
};

// One daemon of a run and the process that is it now.
struct FleetMember {
  enum class Role { kShard, kPredictionServer, kWorker, kEvaluator };
  Role role = Role::kShard;
  int group = -1;    // index in the job; -1 for the evaluator and servers of a teacher
  int teacher = -1;  // index in job.teachers of a prediction server that serves one
  int index = 0;
  std::string name;  // "alpha.shard.0", "alpha.worker.0", "teacher.prediction.0", "evaluator"
  ChildProcess process;
  std::string address;  // host:port once ready
  std::string http_address;
  int restarts = 0;
  bool left_out = false;  // lost, and its elastic group goes on without it
};

// All daemons of a job as children of this process, on loopback with ports the kernel chose. They
// are started in the order in which they need one another's addresses: shards, leaders, prediction
// servers (of groups and other teachers that need some), workers, evaluator; before each of these
// the job file in the run directory is rewritten with the addresses known so far. External teachers
// keep the addresses that the job gives. A daemon that is started again keeps its port. Not
// thread-safe; use from the main thread only (see ChildProcess).
class Fleet {
 public:
  struct Options {
    JobConfig job;  // resolved: archive_dir, checkpoint.directory and run_id are set
    RunDirectory directory;
    std::string data_dir;
    BinaryPaths binaries;
    std::vector<std::string> flags;  // further ones, for every daemon
    // Every daemon writes what it did when to NAME.json in the directory of traces.
    bool trace = false;
    bool restart = false;   // start a daemon again that a signal killed
    int max_restarts = 20;  // of one daemon
    absl::Duration ready_timeout = absl::Seconds(120);
    // Further flags of single daemons, by name.
    std::map<std::string, std::vector<std::string>> flags_of;
    std::function<bool()> cancelled;              // polled while waiting
    std::function<void(const std::string&)> say;  // one line for people
  };
  explicit Fleet(Options options);
  // Kills what is still running.
  ~Fleet();

  absl::Status Start();

  // Looks after the children once. An error names the daemon that was lost for good and the end of
  // its log. A worker or the evaluator may exit with code 0; of any other daemon that means that
  // somebody drained it: CANCELLED. A worker of an elastic group that a signal killed is left out
  // while its group has another.
  absl::Status Supervise();

  // ELASTIC: starts a worker that the group did not begin with, or one that has ended, again. Does
  // not wait until it is ready.
  absl::Status AddWorker(int group, int index);

  bool WorkersDone();    // every worker that was not left out has exited cleanly
  bool EvaluatorDone();  // it has, or the job has none

  // Ends everything in order, cleanly where possible, by force after `timeout`. OK if every daemon
  // exited with code 0. Restarts nothing from here on.
  absl::Status Drain(absl::Duration timeout);

  const JobConfig& job() const { return options_.job; }
  const std::vector<std::unique_ptr<FleetMember>>& members() const { return members_; }
  // Addresses of the groups' leaders, by group index.
  std::vector<std::string> LeaderAddresses() const;
  std::string LogPath(const FleetMember& member) const;

 private:
  bool CanDoWithout(const FleetMember& member) const;
  absl::Status Launch(FleetMember* member);
  absl::Status Launch(FleetMember::Role role, bool leaders);
  absl::Status AwaitReady(const std::vector<FleetMember*>& waiting);
  absl::Status WriteAddresses();
  std::vector<std::string> CommandLine(const FleetMember& member) const;
  std::string ReadyFile(const FleetMember& member) const;
  absl::Status LostError(const FleetMember& member, const ExitState& exit) const;
  bool WaitForExit(const std::vector<FleetMember*>& members, absl::Time deadline);
  std::vector<FleetMember*> Select(FleetMember::Role role);

  Options options_;
  std::vector<std::unique_ptr<FleetMember>> members_;
};

}  // namespace codistill

#endif  // CODISTILL_CONTROL_FLEET_H_
