#ifndef CODISTILL_SERVER_LEADER_HARNESS_H_
#define CODISTILL_SERVER_LEADER_HARNESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/base/simulated_clock.h"
#include "gtest/gtest.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/leader.h"
#include "server/shard_link.h"

// For tests: a leader with shards that are puppets, workers that the test plays, a clock that moves
// only when told and a disk that fails when told. One thread.
namespace codistill {

// A shard as its leader sees it: answers at once, or as the test says.
class PuppetShard final : public ShardLink {
 public:
  explicit PuppetShard(int index) : index_(index) {}

  void Probe(const ProbeRequest&, absl::Duration, Done<ProbeReply> done) override;
  void Restore(const RestoreRequest& request, absl::Duration, Done<RestoreReply> done) override;
  void Prepare(const PrepareRequest& request, absl::Duration timeout,
               Done<PrepareReply> done) override;
  void Commit(const CommitRequest& request, absl::Duration, Done<CommitReply> done) override;
  // Writes a file without tensors.
  void WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration,
                       Done<WriteCheckpointReply> done) override;

  // Answers what was held.
  void Release();

  bool reachable = true;
  uint64_t nonce = 100;
  uint64_t generation = 0;
  uint64_t incarnation = 0;
  uint64_t end_example = 0;   // of pushes seen
  int64_t furthest_step = 0;  // own step of a rank
  int64_t step = 0;
  absl::Status restore_error, commit_error, write_error;
  int restore_errors = 0;                                  // 0 = for ever
  absl::StatusOr<PrepareReply> prepared = PrepareReply();  // the answer to every Prepare
  std::vector<PrepareRequest> prepares;
  bool hold_prepares = false;
  bool hold_commits = false, hold_writes = false;
  std::vector<RestoreRequest> restores;
  std::vector<CommitRequest> commits;
  std::vector<WriteCheckpointRequest> writes;
  std::map<int, RankPushes> pushes;  // by rank, as a probe tells of them
  std::vector<std::function<void()>> held;

 private:
  void AnswerCommit(const CommitRequest& request, const Done<CommitReply>& done);
  void AnswerWrite(const WriteCheckpointRequest& request, const Done<WriteCheckpointReply>& done);

  const int index_;
};

// The leader of group "alpha" of TestJob: two shards, two workers, 20 steps.
class LeaderTest : public testing::Test {
 protected:
  static constexpr int kShards = 2;

  void SetUp() override;
  void TearDown() override { leader_.reset(); }

  // Before Make or Start: checkpoints in a directory of this test.
  void UseCheckpoints(int64_t every);
  // A leader in place of the one before, as after a crash.
  void Make();
  // The same with shards found and all workers registered.
  void Start();
  // Lets `time` go by, with a tick every 100 ms.
  void Pass(absl::Duration time);

  // What workers do. They speak with the generation and the incarnation of their last Register.
  absl::Status Register(int rank, uint64_t process = 0);
  struct Asked {
    bool answered = false;
    absl::StatusOr<GetAssignmentsReply> reply;
  };
  std::shared_ptr<Asked> Ask(int rank, int64_t first = 0, int count = 1);
  absl::Status End(int rank, int shard, int64_t step, bool finite = true,
                   const std::string& state = "");
  void MustEnd(int rank, int shard, int64_t step, bool finite = true,
               const std::string& state = "");
  absl::Status HeartbeatStatus(int rank, const std::string& fatal = "", bool leaving = false);

  // All pushes of a step; whole steps.
  void EndAll(int64_t step);
  void Run(int64_t from, int64_t to);

  GroupState State() { return leader_->State(true); }
  GroupState::Phase Phase() { return State().phase(); }
  int64_t StepNow() { return State().version().step(); }
  // Names in the group's checkpoint directory.
  std::vector<std::string> Files();

  SimulatedClock clock_;
  FaultInjectingFileSystem disk_;
  std::string directory_;
  ShardMap map_;
  JobConfig job_;
  uint64_t nonce_ = 0;
  std::vector<std::unique_ptr<PuppetShard>> shards_;
  std::map<int, RegisterReply> replies_;  // by rank, the last
  std::unique_ptr<GroupLeader> leader_;
  absl::Status superseded_;  // what the leader said when a newer one came
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_LEADER_HARNESS_H_
