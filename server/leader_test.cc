#include "server/leader.h"

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/base/simulated_clock.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"
#include "common/config/shard_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A shard as its leader sees it: answers at once, or as the test says.
class PuppetShard final : public ShardLink {
 public:
  explicit PuppetShard(int index) : index_(index) {}

  void Probe(const ProbeRequest&, absl::Duration, Done<ProbeReply> done) override {
    if (!reachable) return done(absl::UnavailableError("connection refused"));
    ProbeReply reply;
    reply.set_shard(index_);
    reply.set_process_nonce(nonce);
    reply.set_generation(generation);
    reply.set_step(step);
    done(reply);
  }

  void Restore(const RestoreRequest& request, absl::Duration, Done<RestoreReply> done) override {
    restores.push_back(request);
    if (!reachable) return done(absl::UnavailableError("connection refused"));
    if (!restore_error.ok()) {
      const absl::Status error = restore_error;
      if (restore_errors > 0 && --restore_errors == 0) restore_error = absl::OkStatus();
      return done(error);
    }
    generation = request.generation();
    Version version;
    ParseManifestName(request.manifest(), &version);
    step = request.manifest().empty() ? 0 : version.step();
    RestoreReply reply;
    reply.set_step(step);
    reply.set_process_nonce(nonce);
    done(reply);
  }

  void Commit(const CommitRequest& request, absl::Duration, Done<CommitReply> done) override {
    commits.push_back(request);
    if (hold_commits) {
      held.push_back([this, request, done] { AnswerCommit(request, done); });
      return;
    }
    AnswerCommit(request, done);
  }

  void WriteCheckpoint(const WriteCheckpointRequest& request, absl::Duration,
                       Done<WriteCheckpointReply> done) override {
    writes.push_back(request);
    if (hold_writes) {
      held.push_back([this, request, done] { AnswerWrite(request, done); });
      return;
    }
    AnswerWrite(request, done);
  }

  void Release() {
    std::vector<std::function<void()>> answers;
    answers.swap(held);
    for (auto& answer : answers) answer();
  }

  bool reachable = true;
  uint64_t nonce = 100;
  uint64_t generation = 0;
  int64_t step = 0;
  absl::Status restore_error, commit_error, write_error;
  int restore_errors = 0;  // 0 = for ever
  bool hold_commits = false, hold_writes = false;
  std::vector<RestoreRequest> restores;
  std::vector<CommitRequest> commits;
  std::vector<WriteCheckpointRequest> writes;
  std::vector<std::function<void()>> held;

 private:
  void AnswerCommit(const CommitRequest& request, const Done<CommitReply>& done) {
    if (!commit_error.ok()) return done(commit_error);
    if (request.contributors_size() > 0 || request.rejected_size() > 0) step = request.step();
    CommitReply reply;
    reply.set_step(step);
    done(reply);
  }
  void AnswerWrite(const WriteCheckpointRequest& request, const Done<WriteCheckpointReply>& done) {
    if (!write_error.ok()) return done(write_error);
    CheckpointShardHeader identity;
    identity.set_shard(index_);
    identity.mutable_version()->set_generation(request.generation());
    identity.mutable_version()->set_step(request.step());
    const auto file = WriteShardFile(
        request.directory(), ShardFileName(index_, 2, identity.version(), request.attempt()),
        identity, {});
    if (!file.ok()) return done(file.status());
    WriteCheckpointReply reply;
    reply.set_file_name(file->name());
    reply.set_bytes(file->bytes());
    reply.set_crc32c(file->crc32c());
    done(reply);
  }

  const int index_;
};

class LeaderTest : public testing::Test {
 protected:
  static constexpr int kShards = 2;

  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "leader",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    map_ = BuildShardMap(TestTensors(), kShards).value();
    job_ = TestJob("unused", kShards, 2);
    for (int s = 0; s < kShards; ++s) shards_.push_back(std::make_unique<PuppetShard>(s));
  }

  void TearDown() override { leader_.reset(); }

  void UseCheckpoints(int64_t every) {
    job_.mutable_checkpoint()->set_directory(directory_);
    job_.mutable_checkpoint()->set_every_steps(every);
  }

  void Make() {
    leader_.reset();  // lets go of the directory
    GroupLeader::Options options;
    options.job = job_;
    options.map = map_;
    options.map_digest = ShardMapDigest(map_);
    options.nonce = ++nonce_;
    for (auto& shard : shards_) options.links.push_back(shard.get());
    options.clock = &clock_;
    options.file_system = &disk_;
    options.run_io = [](std::function<void()> task) { task(); };
    auto leader = GroupLeader::Create(options);
    ASSERT_TRUE(leader.ok()) << leader.status();
    leader_ = *std::move(leader);
    leader_->SetAddresses("leader:1", {"shard:0", "shard:1"});
  }

  void Start() {
    Make();
    Pass(absl::Milliseconds(600));
    for (int rank = 0; rank < job_.groups(0).num_workers(); ++rank) {
      ASSERT_TRUE(Register(rank).ok());
    }
  }

  void Pass(absl::Duration time) {
    for (absl::Duration done; done < time; done += absl::Milliseconds(100)) {
      clock_.Advance(absl::Milliseconds(100));
      leader_->Tick();
    }
  }

  absl::Status Register(int rank, uint64_t process = 0) {
    RegisterRequest request;
    request.set_rank(rank);
    request.set_process_nonce(process == 0 ? 1000 + rank : process);
    *request.mutable_tensors() = TestTensors().tensors();
    const auto reply = leader_->Register(request);
    if (reply.ok()) replies_[rank] = *reply;
    return reply.status();
  }

  struct Asked {
    bool answered = false;
    absl::StatusOr<GetAssignmentsReply> reply;
  };
  std::shared_ptr<Asked> Ask(int rank, int64_t first = 0, int count = 1) {
    GetAssignmentsRequest request;
    request.set_generation(replies_[rank].generation());
    request.set_rank(rank);
    request.set_incarnation(replies_[rank].incarnation());
    request.set_first_step(first);
    request.set_max_assignments(count);
    auto asked = std::make_shared<Asked>();
    leader_->GetAssignments(request, clock_.Now() + absl::Seconds(5),
                            [asked](absl::StatusOr<GetAssignmentsReply> reply) {
                              asked->answered = true;
                              asked->reply = std::move(reply);
                            });
    return asked;
  }

  absl::Status End(int rank, int shard, int64_t step, bool finite = true,
                   const std::string& state = "") {
    ReportEndRequest request;
    request.set_generation(replies_[rank].generation());
    request.set_step(step);
    request.set_rank(rank);
    request.set_incarnation(replies_[rank].incarnation());
    request.set_shard(shard);
    request.mutable_end()->set_num_examples(4);
    request.mutable_end()->set_num_labels(4);
    request.mutable_end()->set_label_loss_sum(8);
    request.mutable_end()->set_finite(finite);
    if (!finite) request.mutable_end()->set_not_finite_tensor("w");
    request.set_worker_state(state);
    return leader_->ReportEnd(request);
  }

  void MustEnd(int rank, int shard, int64_t step, bool finite = true,
               const std::string& state = "") {
    const absl::Status status = End(rank, shard, step, finite, state);
    ASSERT_TRUE(status.ok()) << status;
  }

  void EndAll(int64_t step) {
    for (int rank = 0; rank < job_.groups(0).num_workers(); ++rank) {
      for (int shard = 0; shard < kShards; ++shard) MustEnd(rank, shard, step);
    }
  }

  void Run(int64_t from, int64_t to) {
    for (int64_t step = from; step <= to; ++step) {
      Ask(0);
      Ask(1);
      EndAll(step);
    }
  }

  GroupState State() { return leader_->State(true); }
  GroupState::Phase Phase() { return State().phase(); }
  int64_t StepNow() { return State().version().step(); }
  std::vector<std::string> Files() {
    return FileSystem::Real()->ListDir(JoinPath(directory_, "alpha")).value();
  }

  absl::Status HeartbeatStatus(int rank, const std::string& fatal = "", bool leaving = false) {
    HeartbeatRequest request;
    request.set_rank(rank);
    request.set_incarnation(replies_[rank].incarnation());
    request.set_fatal_error(fatal);
    request.set_leaving(leaving);
    return leader_->Heartbeat(request).status();
  }

  SimulatedClock clock_;
  FaultInjectingFileSystem disk_;
  std::string directory_;
  ShardMap map_;
  JobConfig job_;
  uint64_t nonce_ = 0;
  std::vector<std::unique_ptr<PuppetShard>> shards_;
  std::map<int, RegisterReply> replies_;
  std::unique_ptr<GroupLeader> leader_;
};

TEST_F(LeaderTest, WaitsForShardsThenForWorkers) {
  shards_[1]->reachable = false;
  Make();
  Pass(absl::Minutes(5));  // a shard never seen is waited for
  EXPECT_EQ(Phase(), GroupState::STARTING);
  EXPECT_THAT(shards_[0]->restores, IsEmpty());
  EXPECT_EQ(Register(0).code(), absl::StatusCode::kUnavailable);
  shards_[1]->reachable = true;
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::STARTING);
  EXPECT_EQ(State().newest_cut().step(), 0);
  EXPECT_GT(State().newest_cut().generation(), 0u);  // followers can load at once
  ASSERT_EQ(shards_[1]->restores.size(), 1u);
  EXPECT_EQ(shards_[1]->restores[0].leader_address(), "leader:1");
  EXPECT_EQ(shards_[1]->restores[0].manifest(), "");
  ASSERT_TRUE(Register(0).ok());
  const auto asked = Ask(0);
  EXPECT_FALSE(asked->answered);
  ASSERT_TRUE(Register(1).ok());
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  ASSERT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments_size(), 1);
}

TEST_F(LeaderTest, RefusesAnotherModel) {
  Start();
  RegisterRequest request;
  *request.mutable_tensors() = TestTensors().tensors();
  request.mutable_tensors(1)->set_shape(0, 64);
  const auto reply = leader_->Register(request);
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(reply.status().message()), HasSubstr("b"));
}

TEST_F(LeaderTest, AssignmentsAreAPureFunctionOfTheStep) {
  Start();
  const auto r0 = Ask(0, 0, 3), r1 = Ask(1, 0, 2);
  ASSERT_EQ(r0->reply->assignments_size(), 3);
  ASSERT_EQ(r1->reply->assignments_size(), 2);
  for (int i = 0; i < 3; ++i) {
    const Assignment& a = r0->reply->assignments(i);
    EXPECT_EQ(a.step(), i + 1);
    EXPECT_EQ(a.first_example(), 8u * i);
    EXPECT_EQ(a.num_examples(), 4);
    EXPECT_EQ(a.weights_step(), i);
    EXPECT_THAT(a.members(), ElementsAre(0, 1));
    EXPECT_FALSE(a.want_worker_state());
  }
  EXPECT_EQ(r1->reply->assignments(1).first_example(), 12u);
  // Further ones wait for the group.
  const auto later = Ask(0, 4, 3);
  EXPECT_FALSE(later->answered);
  EndAll(1);
  ASSERT_TRUE(later->answered);
  ASSERT_EQ(later->reply->assignments_size(), 1);
  EXPECT_EQ(later->reply->assignments(0).step(), 4);
  // Handed out again just the same.
  const auto again = Ask(0, 2, 2);
  EXPECT_EQ(again->reply->assignments(0).first_example(), 8u);
}

TEST_F(LeaderTest, NothingToHandOutIsAnEmptyListAtTheDeadline) {
  Make();
  Pass(absl::Seconds(1));
  ASSERT_TRUE(Register(0).ok());
  const auto asked = Ask(0);
  Pass(absl::Seconds(4));
  EXPECT_FALSE(asked->answered);
  Pass(absl::Seconds(2));
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply.ok());
  EXPECT_EQ(asked->reply->assignments_size(), 0);
  EXPECT_FALSE(asked->reply->finished());
}

TEST_F(LeaderTest, OneDecisionForAllShards) {
  Start();
  EXPECT_TRUE(End(0, 0, 1).ok());
  EXPECT_TRUE(End(0, 1, 1).ok());
  EXPECT_TRUE(End(1, 0, 1).ok());
  EXPECT_THAT(shards_[0]->commits, IsEmpty());
  EXPECT_TRUE(End(1, 1, 1).ok());
  for (const auto& shard : shards_) {
    ASSERT_EQ(shard->commits.size(), 1u);
    const CommitRequest& commit = shard->commits[0];
    EXPECT_EQ(commit.step(), 1);
    ASSERT_EQ(commit.contributors_size(), 2);
    EXPECT_EQ(commit.contributors(1).rank(), 1);
    EXPECT_EQ(commit.contributors(1).num_examples(), 4);
    EXPECT_DOUBLE_EQ(commit.learning_rate(), 0.5);
    EXPECT_EQ(commit.clip_scale(), 1);
    EXPECT_FALSE(commit.publish());
  }
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(leader_->GetHistory().examples(), 8);
}

TEST_F(LeaderTest, PublishesOnlyWhatAllShardsHave) {
  Start();
  Run(1, 4);
  shards_[1]->hold_commits = true;
  EndAll(5);
  EXPECT_TRUE(shards_[0]->commits.back().publish());
  EXPECT_EQ(StepNow(), 4);
  EXPECT_EQ(State().newest_cut().step(), 0);
  // A fast worker may push the next step before the leader has heard from the slow shard.
  EndAll(6);
  EXPECT_EQ(StepNow(), 4);
  shards_[1]->hold_commits = false;
  shards_[1]->Release();
  EXPECT_EQ(StepNow(), 6);
  EXPECT_EQ(State().newest_cut().step(), 5);
}

TEST_F(LeaderTest, PushesThatAreNotFiniteAreRejected) {
  Start();
  MustEnd(0, 0, 1);
  MustEnd(0, 1, 1, /*finite=*/false);
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  const CommitRequest& commit = shards_[0]->commits[0];
  EXPECT_THAT(commit.rejected(), ElementsAre(0));
  ASSERT_EQ(commit.contributors_size(), 1);
  EXPECT_EQ(commit.contributors(0).rank(), 1);
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(leader_->counters().rejected, 1);
}

TEST_F(LeaderTest, UnreachableShardIsAskedAgainInTheSameGeneration) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->commit_error = absl::UnavailableError("connection reset");
  EndAll(1);
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(shards_[0]->commits.size(), 1u);  // has answered
  EXPECT_GT(shards_[1]->commits.size(), 2u);
  shards_[1]->commit_error = absl::OkStatus();
  Pass(absl::Seconds(1));
  EXPECT_EQ(StepNow(), 1);
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_EQ(leader_->GetHistory().restores(), 0);
}

TEST_F(LeaderTest, FinishesAtTheLastStep) {
  Start();
  Run(1, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(State().newest_cut().step(), 20);
  const auto asked = Ask(0, 21, 2);
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply->finished());
  const GetHistoryReply history = leader_->GetHistory();
  EXPECT_EQ(history.training_size(), 10);
  EXPECT_DOUBLE_EQ(history.training(0).label_loss(), 2.0);
  EXPECT_EQ(history.examples(), 160);
}

TEST_F(LeaderTest, OlderProcessOfARankIsTurnedAway) {
  Start();
  const RegisterReply old = replies_[0];
  MustEnd(0, 0, 1);
  const auto parked = Ask(0, 5);
  ASSERT_TRUE(Register(0, /*process=*/77).ok());
  EXPECT_GT(replies_[0].incarnation(), old.incarnation());
  ASSERT_TRUE(parked->answered);
  EXPECT_EQ(parked->reply.status().code(), absl::StatusCode::kFailedPrecondition);
  const RegisterReply fresh = replies_[0];
  replies_[0] = old;
  EXPECT_EQ(End(0, 1, 1).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(HeartbeatStatus(0).code(), absl::StatusCode::kFailedPrecondition);
  replies_[0] = fresh;
  // What the old one had ended on one shard does not count.
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  MustEnd(0, 1, 1);
  EXPECT_EQ(StepNow(), 0);
  MustEnd(0, 0, 1);
  EXPECT_EQ(StepNow(), 1);
}

TEST_F(LeaderTest, MissingWorkerFailsTheGroupByName) {
  Start();
  Ask(0);
  Ask(1);
  EndAll(1);
  MustEnd(0, 0, 2);
  MustEnd(0, 1, 2);
  for (int i = 0; i < 59; ++i) {
    Pass(absl::Seconds(1));
    ASSERT_TRUE(HeartbeatStatus(0).ok());
  }
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  Pass(absl::Seconds(2));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "worker 1 of group alpha: not heard from for 60 s");
  EXPECT_EQ(HeartbeatStatus(0).code(), absl::StatusCode::kFailedPrecondition);
  const auto asked = Ask(0);
  EXPECT_THAT(std::string(asked->reply.status().message()), HasSubstr("worker 1"));
}

TEST_F(LeaderTest, RestartedWorkerIsWaitedFor) {
  Start();
  MustEnd(0, 0, 1);
  MustEnd(0, 1, 1);
  for (int i = 0; i < 50; ++i) {
    Pass(absl::Seconds(1));
    HeartbeatStatus(0).IgnoreError();
  }
  ASSERT_TRUE(Register(1, 88).ok());
  Pass(absl::Seconds(30));
  HeartbeatStatus(0).IgnoreError();
  HeartbeatStatus(1).IgnoreError();
  EXPECT_EQ(Phase(), GroupState::TRAINING);
  MustEnd(1, 0, 1);
  MustEnd(1, 1, 1);
  EXPECT_EQ(StepNow(), 1);
}

TEST_F(LeaderTest, WorkersFatalErrorFailsTheGroup) {
  Start();
  EXPECT_FALSE(HeartbeatStatus(1, "train.csv: record 17 has 14 values, not 15").ok());
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("worker 1 of group alpha: train.csv: record 17"));
  absl::Status drained;
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(1));
  EXPECT_EQ(drained.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LeaderTest, LostShardRestoresTheWholeGroup) {
  UseCheckpoints(/*every=*/6);
  Start();
  const uint64_t first = State().version().generation();
  EXPECT_EQ(first, 1u);
  Run(1, 8);
  EXPECT_EQ(leader_->GetHistory().examples(), 64);
  const auto parked = Ask(0, 12);
  shards_[1]->nonce = 200;  // restarted: a process with nothing in it
  shards_[1]->generation = 0;
  Pass(absl::Seconds(1));
  ASSERT_TRUE(parked->answered);
  EXPECT_EQ(parked->reply.status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(State().version().generation(), 2u);
  EXPECT_EQ(StepNow(), 6);
  EXPECT_EQ(State().newest_cut().step(), 6);
  for (const auto& shard : shards_) {
    EXPECT_EQ(shard->restores.back().manifest(), "MANIFEST-1-6");
    EXPECT_EQ(shard->restores.back().generation(), 2u);
  }
  EXPECT_EQ(End(0, 0, 9).code(), absl::StatusCode::kAborted);
  const GetHistoryReply history = leader_->GetHistory();
  EXPECT_EQ(history.examples(), 48);
  EXPECT_EQ(history.training_size(), 3);
  EXPECT_EQ(history.restores(), 1);
  // The same processes register again and keep their incarnation; data goes on after step 6.
  const uint64_t incarnation = replies_[0].incarnation();
  ASSERT_TRUE(Register(0).ok());
  ASSERT_TRUE(Register(1).ok());
  EXPECT_EQ(replies_[0].incarnation(), incarnation);
  const auto asked = Ask(1);
  EXPECT_EQ(asked->reply->assignments(0).step(), 7);
  EXPECT_EQ(asked->reply->assignments(0).first_example(), 52u);
  Run(7, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(leader_->GetHistory().examples(), 160);
}

TEST_F(LeaderTest, WithoutCheckpointsALostShardMeansTheInitialWeights) {
  Start();
  const uint64_t first = State().version().generation();
  Run(1, 3);
  shards_[0]->nonce = 200;
  shards_[0]->generation = 0;
  Pass(absl::Seconds(1));
  EXPECT_GT(State().version().generation(), first);
  EXPECT_EQ(StepNow(), 0);
  EXPECT_EQ(shards_[1]->restores.back().manifest(), "");
}

TEST_F(LeaderTest, ShardThatWasOnlyOutOfReachGoesOn) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->reachable = false;
  Pass(absl::Seconds(30));
  shards_[1]->reachable = true;
  Pass(absl::Seconds(1));
  EXPECT_EQ(State().version().generation(), generation);
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, ShardThatStaysAwayFailsTheGroupByName) {
  Start();
  shards_[1]->reachable = false;
  for (int i = 0; i < 62; ++i) {
    Pass(absl::Seconds(1));
    HeartbeatStatus(0).IgnoreError();
    HeartbeatStatus(1).IgnoreError();
  }
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_EQ(State().error(), "shard 1 of group alpha at shard:1: not heard from for 60 s");
}

TEST_F(LeaderTest, CommitThatAShardCannotMakeRestoresTheGroup) {
  Start();
  const uint64_t generation = State().version().generation();
  shards_[1]->commit_error = absl::FailedPreconditionError("the push is not staged");
  EndAll(1);
  shards_[1]->commit_error = absl::OkStatus();
  Pass(absl::Seconds(1));
  EXPECT_GT(State().version().generation(), generation);
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, RestoringForEverIsAFailure) {
  Start();
  shards_[1]->commit_error = absl::FailedPreconditionError("the push is not staged");
  for (int i = 0; i < 30 && Phase() != GroupState::FAILED; ++i) {
    Register(0).IgnoreError();
    Register(1).IgnoreError();
    EndAll(1);
    Pass(absl::Seconds(1));
  }
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("the push is not staged"));
}

TEST_F(LeaderTest, NextLeaderTakesUpTheNewestCheckpoint) {
  UseCheckpoints(5);
  Start();
  Run(1, 4);
  Ask(0);
  Ask(1);
  MustEnd(0, 0, 5, true, "state of rank 0");
  MustEnd(0, 1, 5);
  MustEnd(1, 0, 5);
  MustEnd(1, 1, 5);
  Run(6, 7);
  EXPECT_THAT(Files(), ElementsAre("CLAIM", "GENERATION", "MANIFEST-1-5", "shard-0-of-2-1-5-0",
                                   "shard-1-of-2-1-5-0"));
  Start();  // another leader, as after a crash
  EXPECT_EQ(State().version().generation(), 2u);
  EXPECT_EQ(StepNow(), 5);
  EXPECT_EQ(replies_[0].worker_state(), "state of rank 0");
  EXPECT_EQ(replies_[0].worker_state_step(), 5);
  EXPECT_EQ(replies_[1].worker_state(), "");
  EXPECT_EQ(leader_->GetHistory().restores(), 1);
  EXPECT_EQ(leader_->GetHistory().examples(), 40);
  EXPECT_EQ(Ask(0)->reply->assignments(0).first_example(), 40u);
  Run(6, 20);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-2-20"));
  Start();  // of a finished group
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(State().newest_cut().step(), 20);
}

TEST_F(LeaderTest, DamagedCheckpointsArePassedOver) {
  UseCheckpoints(5);
  Start();
  Run(1, 12);
  const std::string newest = JoinPath(directory_, "alpha", "shard-1-of-2-1-10-0");
  auto bytes = ReadFile(newest, 1 << 20);
  ASSERT_TRUE(bytes.ok());
  bytes->back() ^= 1;
  ASSERT_TRUE(WriteFileAtomically(newest, *bytes).ok());
  Start();
  EXPECT_EQ(StepNow(), 5);
  // All of them damaged: people decide.
  leader_.reset();
  const std::string older = JoinPath(directory_, "alpha", "shard-0-of-2-1-5-0");
  ASSERT_TRUE(FileSystem::Real()->RemoveFile(older).ok());
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr(newest));
  EXPECT_THAT(State().error(), HasSubstr(older));
}

TEST_F(LeaderTest, CheckpointAShardCannotLoadIsPassedOver) {
  UseCheckpoints(5);
  Start();
  Run(1, 12);
  shards_[1]->restore_error = absl::DataLossError("the data of entry 0 is damaged");
  shards_[1]->restore_errors = 1;
  shards_[1]->nonce = 300;
  Pass(absl::Seconds(2));
  EXPECT_EQ(StepNow(), 5);
}

TEST_F(LeaderTest, SecondLeaderIsKeptOutOfTheDirectory) {
  UseCheckpoints(5);
  Start();
  const std::unique_ptr<GroupLeader> first = std::move(leader_);
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr(JoinPath(directory_, "alpha")));
}

TEST_F(LeaderTest, CheckpointOfAnotherJobIsRefused) {
  UseCheckpoints(5);
  Start();
  Run(1, 5);
  job_.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
  Make();
  Pass(absl::Seconds(1));
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("another optimizer: SGD, the job has ADAM"));
}

TEST_F(LeaderTest, FullDiskFailsTheGroupAndKeepsTheOlderCheckpoint) {
  UseCheckpoints(5);
  Start();
  Run(1, 9);
  shards_[1]->write_error = absl::ResourceExhaustedError("write shard-1-of-2: No space left");
  Run(10, 10);
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("write shard-1-of-2: No space left"));
  shards_[1]->write_error = absl::OkStatus();
  Start();
  EXPECT_EQ(StepNow(), 5);
  EXPECT_THAT(Files(), testing::Not(testing::Contains("shard-0-of-2-1-10-0")));  // swept
}

TEST_F(LeaderTest, FullDiskAtTheManifest) {
  UseCheckpoints(5);
  Start();
  Run(1, 9);
  disk_.FailWritesAfter(0);  // shards write elsewhere
  Run(10, 10);
  EXPECT_EQ(Phase(), GroupState::FAILED);
  EXPECT_THAT(State().error(), HasSubstr("MANIFEST-1-10"));
  disk_.Heal();
  Start();
  EXPECT_EQ(StepNow(), 5);
}

TEST_F(LeaderTest, TrainingGoesOnWhileACheckpointIsWritten) {
  UseCheckpoints(5);
  Start();
  Run(1, 4);
  shards_[0]->hold_writes = true;
  Run(5, 9);
  EXPECT_EQ(StepNow(), 9);
  // The next snapshot waits for the first to be on disk.
  EndAll(10);
  EXPECT_EQ(StepNow(), 9);
  shards_[0]->hold_writes = false;
  shards_[0]->Release();
  EXPECT_EQ(StepNow(), 10);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-10"));
}

TEST_F(LeaderTest, KeepsSoManyCheckpoints) {
  UseCheckpoints(2);
  job_.mutable_checkpoint()->set_keep(3);
  Start();
  Run(1, 20);
  int manifests = 0;
  for (const std::string& name : Files()) manifests += name.rfind("MANIFEST", 0) == 0 ? 1 : 0;
  EXPECT_EQ(manifests, 3);
  EXPECT_EQ(Files().size(), 2u + 3 * 3);
}

TEST_F(LeaderTest, CheckpointOnRequestBringsWorkerState) {
  UseCheckpoints(0);
  Start();
  Ask(0, 0, 2);
  absl::StatusOr<CheckpointReply> reply = absl::UnknownError("not answered");
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { reply = std::move(answer); });
  EndAll(1);
  const auto asked = Ask(0, 3, 2);
  ASSERT_EQ(asked->reply->assignments_size(), 1);
  EXPECT_TRUE(asked->reply->assignments(0).want_worker_state());
  EndAll(2);
  EXPECT_FALSE(reply.ok());
  EndAll(3);
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->version().step(), 3);
  EXPECT_THAT(reply->manifest(), HasSubstr("MANIFEST-1-3"));
  EXPECT_GT(reply->bytes(), 0u);
}

TEST_F(LeaderTest, CheckpointWhilePausedIsOfThePresentStep) {
  UseCheckpoints(0);
  Start();
  Run(1, 3);
  ASSERT_TRUE(leader_->Pause().ok());
  absl::StatusOr<CheckpointReply> reply = absl::UnknownError("not answered");
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { reply = std::move(answer); });
  Pass(absl::Seconds(1));
  ASSERT_TRUE(reply.ok()) << reply.status();
  EXPECT_EQ(reply->version().step(), 3);
  EXPECT_TRUE(shards_[0]->commits.back().checkpoint());
  EXPECT_EQ(shards_[0]->commits.back().contributors_size(), 0);
  EXPECT_EQ(StepNow(), 3);
}

TEST_F(LeaderTest, CheckpointWithoutDirectoryIsRefused) {
  Start();
  absl::Status status;
  leader_->Checkpoint([&](absl::StatusOr<CheckpointReply> answer) { status = answer.status(); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LeaderTest, PauseHoldsBackWhatNobodyHas) {
  Start();
  Ask(0, 0, 2);
  ASSERT_TRUE(leader_->Pause().ok());
  EXPECT_EQ(Phase(), GroupState::PAUSED);
  const auto second = Ask(1, 0, 5);  // needs what rank 0 has, and no more
  ASSERT_TRUE(second->answered);
  EXPECT_EQ(second->reply->assignments_size(), 2);
  EndAll(1);
  EndAll(2);
  EXPECT_EQ(StepNow(), 2);
  const auto asked = Ask(0);
  EXPECT_FALSE(asked->answered);
  ASSERT_TRUE(leader_->Resume().ok());
  EXPECT_TRUE(asked->answered);
  EXPECT_EQ(asked->reply->assignments(0).step(), 3);
}

TEST_F(LeaderTest, PauseIsNoReasonToMissAWorker) {
  Start();
  ASSERT_TRUE(leader_->Pause().ok());
  Pass(absl::Minutes(3));
  EXPECT_EQ(Phase(), GroupState::PAUSED);
  ASSERT_TRUE(leader_->Resume().ok());
  Pass(absl::Seconds(30));
  EXPECT_EQ(Phase(), GroupState::TRAINING);
}

TEST_F(LeaderTest, DrainLetsWorkersLeaveAndWritesACheckpoint) {
  UseCheckpoints(0);
  Start();
  Run(1, 7);
  const auto parked = Ask(0, 12);
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  EXPECT_EQ(Phase(), GroupState::DRAINING);
  ASSERT_TRUE(parked->answered);
  EXPECT_TRUE(parked->reply->finished());
  EndAll(8);  // the step in hand still counts
  Pass(absl::Seconds(1));
  EXPECT_EQ(drained.code(), absl::StatusCode::kUnknown);
  HeartbeatStatus(0, "", true).IgnoreError();
  HeartbeatStatus(1, "", true).IgnoreError();
  Pass(absl::Milliseconds(300));
  EXPECT_TRUE(drained.ok()) << drained;
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-8"));
  Start();
  EXPECT_EQ(StepNow(), 8);
}

TEST_F(LeaderTest, DrainDoesNotWaitForEver) {
  UseCheckpoints(0);
  Start();
  Run(1, 2);
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(6));
  EXPECT_TRUE(drained.ok()) << drained;
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-2"));
}

TEST_F(LeaderTest, DrainAtAStepThatHasACheckpointWritesNoOther) {
  UseCheckpoints(5);
  Start();
  Run(1, 5);
  HeartbeatStatus(0, "", true).IgnoreError();
  HeartbeatStatus(1, "", true).IgnoreError();
  const size_t writes = shards_[0]->writes.size();
  absl::Status drained = absl::UnknownError("not yet");
  leader_->Drain([&](absl::Status status) { drained = status; });
  Pass(absl::Seconds(1));
  EXPECT_TRUE(drained.ok());
  EXPECT_EQ(shards_[0]->writes.size(), writes);
}

TEST_F(LeaderTest, ObserversHearOfChangesAndOfSilence) {
  struct Counter : GroupObserver {
    void OnGroupChange() override { ++calls; }
    int calls = 0;
  };
  Start();
  auto counter = std::make_shared<Counter>();
  leader_->Observe(counter);
  Pass(absl::Seconds(2));
  const int idle = counter->calls;
  EXPECT_GE(idle, 1);
  EXPECT_LE(idle, 4);
  EndAll(1);
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 1);
  EndAll(2);
  EndAll(3);
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 1);  // not more often than every 20 ms
  clock_.Advance(absl::Milliseconds(20));
  leader_->Tick();
  EXPECT_EQ(counter->calls, idle + 2);  // once for all that happened
  counter.reset();
  Pass(absl::Seconds(2));  // nobody is called
}

TEST_F(LeaderTest, AsyncCountsShardZeroAndIssuesRangesOnce) {
  UseCheckpoints(8);
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  const auto a = Ask(0, 0, 2), b = Ask(1, 0, 1);
  ASSERT_EQ(a->reply->assignments_size(), 2);
  EXPECT_EQ(a->reply->assignments(0).step(), 1);
  EXPECT_EQ(a->reply->assignments(1).first_example(), 4u);
  EXPECT_EQ(b->reply->assignments(0).first_example(), 8u);
  const auto again = Ask(0, 2, 1);  // the answer was lost: the same range
  EXPECT_EQ(again->reply->assignments(0).first_example(), 4u);
  ASSERT_TRUE(Register(1, 99).ok());  // a new process gets new ones
  EXPECT_EQ(Ask(1, 0, 1)->reply->assignments(0).first_example(), 12u);

  // Reports carry the shard's own count.
  for (int64_t step = 1; step <= 9; ++step) {
    EXPECT_TRUE(End(step % 2, 0, step).ok());
    if (step <= 7) {
      EXPECT_TRUE(End(step % 2, 1, step).ok());
    }
  }
  EXPECT_EQ(StepNow(), 9);
  EXPECT_THAT(State().version().shard_steps(), ElementsAre(9, 7));
  EXPECT_EQ(State().newest_cut().step(), 5);
  EXPECT_THAT(Files(), testing::Contains("MANIFEST-1-8"));
  for (int64_t step = 10; step <= 20; ++step) MustEnd(0, 0, step);
  const auto asked = Ask(0);
  ASSERT_TRUE(asked->answered);
  EXPECT_TRUE(asked->reply->finished());
  EXPECT_NE(Phase(), GroupState::FINISHED);  // the other shard is on its way
  for (int64_t step = 8; step <= 20; ++step) MustEnd(0, 1, step);
  EXPECT_EQ(Phase(), GroupState::FINISHED);
  EXPECT_EQ(State().newest_cut().step(), 20);
}

TEST_F(LeaderTest, AsyncEndsThoughAShardMissedAPush) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Start();
  for (int64_t step = 1; step <= 20; ++step) MustEnd(0, 0, step);
  EXPECT_NE(Phase(), GroupState::FINISHED);
  Pass(absl::Seconds(3));
  EXPECT_EQ(Phase(), GroupState::FINISHED);
}

TEST_F(LeaderTest, UnservedModesAreRefused) {
  GroupLeader::Options options;
  options.job = job_;
  options.map = map_;
  options.job.mutable_training()->set_membership(TrainingConfig::ELASTIC);
  EXPECT_EQ(GroupLeader::Create(options).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(LeaderTest, StatusIsForPeople) {
  Start();
  Run(1, 3);
  Pass(absl::Seconds(3));
  MustEnd(1, 0, 4);
  DaemonStatus status;
  leader_->FillStatus(&status);
  EXPECT_EQ(status.state(), "training");
  EXPECT_THAT(status.detail(), HasSubstr("step 3 of 20"));
  EXPECT_THAT(status.detail(), HasSubstr("waiting for the pushes of ranks 0, 1"));
  EXPECT_EQ(status.members_size(), 2);
  EXPECT_EQ(status.step(), 3);
}

}  // namespace
}  // namespace codistill
