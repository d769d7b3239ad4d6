#include "server/shard.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/base/mutex.h"
#include "common/base/retry_after.h"
#include "common/checkpoint/manifest.h"
#include "common/config/shard_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// A leader that only listens.
class ListeningLeader final : public EndReporter {
 public:
  void SetLeader(const std::string& address) override {
    MutexLock lock(&mu_);
    address_ = address;
  }
  void ReportEnd(ReportEndRequest request, std::function<void(absl::Status)> done) override {
    absl::Status answer;
    {
      MutexLock lock(&mu_);
      reports_.push_back(std::move(request));
      answer = answer_;
    }
    done(answer);
  }
  void set_answer(absl::Status answer) {
    MutexLock lock(&mu_);
    answer_ = std::move(answer);
  }
  std::vector<ReportEndRequest> reports() const {
    MutexLock lock(&mu_);
    return reports_;
  }
  std::string address() const {
    MutexLock lock(&mu_);
    return address_;
  }

 private:
  mutable Mutex mu_;
  std::string address_ ABSL_GUARDED_BY(mu_);
  absl::Status answer_ ABSL_GUARDED_BY(mu_);
  std::vector<ReportEndRequest> reports_ ABSL_GUARDED_BY(mu_);
};

// An answer that comes some time.
template <typename T>
struct Answer {
  Mutex mu;
  bool answered ABSL_GUARDED_BY(mu) = false;
  absl::StatusOr<T> value;

  ModelShard::Done<T> Catch() {
    return [this](absl::StatusOr<T> answer) {
      MutexLock lock(&mu);
      value = std::move(answer);
      answered = true;
    };
  }
  bool come() {
    MutexLock lock(&mu);
    return answered;
  }
  absl::StatusOr<T>& Wait() {
    MutexLock lock(&mu);
    EXPECT_TRUE(mu.AwaitWithTimeout(absl::Condition(&answered), absl::Seconds(20)));
    return value;
  }
};

class ShardTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "shard",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(WriteTestModel(directory_));
    job_ = TestJob(directory_, 1, 2);
    job_.mutable_checkpoint()->set_directory(JoinPath(directory_, "checkpoints"));
    map_ = BuildShardMap(TestTensors(), 1).value();
  }

  void Make() {
    ModelShard::Options options;
    options.job = job_;
    options.map = map_;
    options.map_digest = ShardMapDigest(map_);
    options.process_nonce = 5;
    options.reporter = &leader_;
    options.file_system = &disk_;
    auto shard = ModelShard::Create(options);
    ASSERT_TRUE(shard.ok()) << shard.status();
    shard_ = *std::move(shard);
  }

  absl::StatusOr<RestoreReply> Restore(uint64_t generation, const std::string& manifest = "",
                                       uint64_t leader = 1) {
    RestoreRequest request;
    request.set_generation(generation);
    request.set_leader_nonce(leader);
    request.set_leader_address("leader:1");
    request.set_shard_map_digest(ShardMapDigest(map_));
    request.set_manifest(manifest);
    Answer<RestoreReply> answer;
    shard_->Restore(request, answer.Catch());
    return answer.Wait();
  }

  absl::StatusOr<CommitReply> Commit(int64_t step, const std::vector<Contributor>& contributors,
                                     const std::vector<int>& rejected = {}, bool publish = false,
                                     bool checkpoint = false, uint64_t generation = 1) {
    CommitRequest request;
    request.set_generation(generation);
    request.set_step(step);
    for (const Contributor& c : contributors) *request.add_contributors() = c;
    for (int rank : rejected) request.add_rejected(rank);
    request.set_learning_rate(0.5);
    request.set_clip_scale(1);
    request.set_publish(publish);
    request.set_checkpoint(checkpoint);
    Answer<CommitReply> answer;
    shard_->Commit(request, answer.Catch());
    return answer.Wait();
  }

  static Contributor Of(int rank, uint64_t incarnation = 1, int64_t examples = 1) {
    Contributor contributor;
    contributor.set_rank(rank);
    contributor.set_incarnation(incarnation);
    contributor.set_num_examples(examples);
    return contributor;
  }

  PushBegin Begin(int rank, int64_t step, uint64_t incarnation = 1, uint64_t generation = 1) {
    PushBegin begin;
    begin.set_generation(generation);
    begin.set_rank(rank);
    begin.set_step(step);
    begin.set_incarnation(incarnation);
    begin.set_shard_map_digest(ShardMapDigest(map_));
    return begin;
  }

  absl::StatusOr<std::shared_ptr<StagedPush>> Stage(const PushBegin& begin, float gradient = 2) {
    auto push = shard_->BeginPush(begin);
    if (!push.ok()) return push;
    for (const ShardPiece& piece : shard_->store().layout().pieces()) {
      if (piece.role == TensorSpec::FROZEN) continue;
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_count(piece.piece.count());
      chunk.set_dtype(piece.dtype);
      const bool parameter = piece.role == TensorSpec::PARAMETER;
      chunk.set_content(parameter ? TensorChunk::GRADIENT : TensorChunk::VALUE);
      const auto place = (*push)->Place(chunk, piece.bytes);
      if (!place.ok()) return place.status();
      std::memset(*place, 0, piece.bytes);
      if (parameter) {
        std::fill_n(static_cast<float*>(*place), piece.piece.count(), gradient);
      }
    }
    return push;
  }

  // Stages and ends; the answer comes with the decision.
  std::unique_ptr<Answer<PushReply>> Push(const PushBegin& begin, bool finite = true) {
    auto answer = std::make_unique<Answer<PushReply>>();
    auto push = Stage(begin);
    if (!push.ok()) {
      answer->Catch()(push.status());
      return answer;
    }
    PushEnd end;
    end.set_num_examples(1);
    end.set_finite(finite);
    if (!finite) end.set_not_finite_tensor("w");
    shard_->EndPush(*std::move(push), end, answer->Catch());
    return answer;
  }

  std::unique_ptr<Answer<std::unique_ptr<PullSource>>> Pull(
      const std::function<void(PullRequest*)>& set, uint64_t generation = 1) {
    PullRequest request;
    request.set_generation(generation);
    request.set_shard_map_digest(ShardMapDigest(map_));
    set(&request);
    auto answer = std::make_unique<Answer<std::unique_ptr<PullSource>>>();
    shard_->Pull(request, answer->Catch());
    return answer;
  }

  float FirstOf(PullSource* source) {
    const auto block = source->Read(0);
    EXPECT_TRUE(block.ok()) << block.status();
    return block.ok() ? *static_cast<const float*>(block->data) : 0;
  }

  std::string directory_;
  JobConfig job_;
  ShardMap map_;
  ListeningLeader leader_;
  FaultInjectingFileSystem disk_;
  std::unique_ptr<ModelShard> shard_;
};

TEST_F(ShardTest, NothingIsServedBeforeItsLeaderHasCalled) {
  Make();
  EXPECT_EQ(shard_->Probe().generation(), 0u);
  EXPECT_EQ(shard_->Probe().process_nonce(), 5u);
  EXPECT_EQ(Push(Begin(0, 1))->Wait().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Pull([](PullRequest* r) { r->set_step(0); })->Wait().status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(Commit(1, {}).status().code(), absl::StatusCode::kAborted);
  ASSERT_TRUE(Restore(1).ok());
  EXPECT_EQ(leader_.address(), "leader:1");
  EXPECT_EQ(shard_->state().newest_cut, 0);
}

TEST_F(ShardTest, RestoreKnowsItsLeader) {
  Make();
  ASSERT_TRUE(Restore(3).ok());
  EXPECT_TRUE(Restore(3).ok());  // asked again
  EXPECT_EQ(shard_->counters().restores, 1);
  EXPECT_EQ(Restore(2).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Restore(3, "", /*leader=*/2).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Restore(4, "", /*leader=*/2).ok());
  RestoreRequest request;
  request.set_generation(5);
  request.set_shard_map_digest(1);
  Answer<RestoreReply> answer;
  shard_->Restore(request, answer.Catch());
  EXPECT_EQ(answer.Wait().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ShardTest, AStepFromPushToPull) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto waiting = Pull([](PullRequest* r) { r->set_step(1); });
  const auto a = Push(Begin(0, 1)), b = Push(Begin(1, 1));
  ASSERT_EQ(leader_.reports().size(), 2u);
  EXPECT_EQ(leader_.reports()[1].rank(), 1);
  EXPECT_EQ(leader_.reports()[1].group().run_id(), "run-7");
  EXPECT_FALSE(a->come());
  EXPECT_FALSE(waiting->come());
  ASSERT_TRUE(Commit(1, {Of(0), Of(1)}, {}, /*publish=*/true).ok());
  EXPECT_EQ(a->Wait()->outcome(), APPLIED);
  EXPECT_EQ(b->Wait()->step(), 1);
  ASSERT_TRUE(waiting->Wait().ok());
  EXPECT_NEAR(FirstOf(waiting->value->get()), TestValue("w", 0) - 1, 1e-5);
  const auto cut = Pull([](PullRequest* r) { r->set_cut_step(1); });
  ASSERT_TRUE(cut->Wait().ok());
  EXPECT_EQ((*cut->value)->version().step(), 1);
  // Idempotent, and strict about order.
  EXPECT_EQ(Commit(1, {Of(0), Of(1)})->step(), 1);
  EXPECT_EQ(Commit(3, {}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Commit(2, {Of(0)}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Commit(2, {}, {}, false, false, /*generation=*/9).status().code(),
            absl::StatusCode::kAborted);
  // The push comes again because its answer was lost.
  EXPECT_EQ(Push(Begin(0, 1))->Wait()->outcome(), DUPLICATE);
  const auto passed = Pull([](PullRequest* r) { r->set_step(0); });
  EXPECT_EQ(passed->Wait().status().code(), absl::StatusCode::kOutOfRange);
}

// A worker with weights_lag may compute the next step on the weights before the newest, and begins
// its push before it hears of the one before.
TEST_F(ShardTest, WithWeightsLagTheWeightsBeforeTheNewestCanBePulled) {
  job_.mutable_training()->set_weights_lag(1);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto of_step = [&](int64_t step) {
    return Pull([step](PullRequest* r) { r->set_step(step); });
  };
  for (int64_t step = 1; step <= 3; ++step) {
    const auto a = Push(Begin(0, step)), b = Push(Begin(1, step));
    ASSERT_TRUE(Commit(step, {Of(0), Of(1)}).ok());
    EXPECT_EQ(a->Wait()->outcome(), APPLIED);
    EXPECT_EQ(b->Wait()->outcome(), APPLIED);
    const auto newest = of_step(step), before = of_step(step - 1);
    ASSERT_TRUE(newest->Wait().ok());
    ASSERT_TRUE(before->Wait().ok()) << before->value.status();
    EXPECT_EQ((*before->value)->version().step(), step - 1);
    EXPECT_NEAR(FirstOf(newest->value->get()), TestValue("w", 0) - step, 1e-4);
    EXPECT_NEAR(FirstOf(before->value->get()), TestValue("w", 0) - (step - 1), 1e-4);
    if (step >= 2) {
      EXPECT_EQ(of_step(step - 2)->Wait().status().code(), absl::StatusCode::kOutOfRange);
    }
  }

  // Begun a step ahead, in whatever order they arrive: neither takes the other's place.
  const auto second = shard_->BeginPush(Begin(0, 5)), first = shard_->BeginPush(Begin(0, 4));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_FALSE((*first)->superseded());
  EXPECT_FALSE((*second)->superseded());
  EXPECT_EQ(shard_->BeginPush(Begin(0, 6)).status().code(), absl::StatusCode::kFailedPrecondition);
  // The same step again does, and another process of the rank does to both.
  const auto again = shard_->BeginPush(Begin(0, 4));
  ASSERT_TRUE(again.ok());
  EXPECT_TRUE((*first)->superseded());
  EXPECT_FALSE((*second)->superseded());
  ASSERT_TRUE(shard_->BeginPush(Begin(0, 4, /*incarnation=*/2)).ok());
  EXPECT_TRUE((*again)->superseded());
  EXPECT_TRUE((*second)->superseded());

  // Another generation has nothing before its first step.
  ASSERT_TRUE(Restore(2).ok());
  const auto restored = Pull([](PullRequest* r) {
    r->set_generation(2);
    r->set_step(0);
  });
  EXPECT_TRUE(restored->Wait().ok()) << restored->value.status();
}

TEST_F(ShardTest, WithoutItThereIsOneVersion) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  EXPECT_EQ(shard_->BeginPush(Begin(0, 2)).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(ShardTest, RejectedAndLatePushesAreAnsweredAsSuch) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto bad = Push(Begin(0, 1), /*finite=*/false);
  const auto late = Push(Begin(1, 1));
  ASSERT_TRUE(Commit(1, {}, {0}).ok());
  EXPECT_EQ(bad->Wait()->outcome(), REJECTED);
  EXPECT_THAT(bad->value->message(), HasSubstr("tensor w"));
  EXPECT_EQ(late->Wait()->outcome(), DROPPED_LATE);
  EXPECT_EQ(Push(Begin(0, 1))->Wait()->outcome(), REJECTED);
  EXPECT_EQ(Push(Begin(1, 1))->Wait()->outcome(), DROPPED_LATE);
  const auto now = Pull([](PullRequest* r) { r->set_step(1); });
  ASSERT_TRUE(now->Wait().ok());
  EXPECT_EQ(FirstOf(now->value->get()), TestValue("w", 0));
}

TEST_F(ShardTest, EveryPushIsAccountedFor) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto counts = [&](int rank) {
    for (const RankPushes& of : shard_->push_counts()) {
      if (of.rank() == rank) return of.counts();
    }
    return PushCounts();
  };
  const auto applied = Push(Begin(0, 1));
  const auto bad = Push(Begin(1, 1), /*finite=*/false);
  EXPECT_EQ(counts(0).open(), 1);
  ASSERT_TRUE(Commit(1, {Of(0)}, {1}).ok());
  EXPECT_EQ(applied->Wait()->step(), 1);
  EXPECT_EQ(bad->Wait()->step(), 1);
  ASSERT_TRUE(Commit(2, {}).ok());
  EXPECT_EQ(Push(Begin(0, 1))->Wait()->outcome(), DUPLICATE);
  const auto late = Push(Begin(0, 2));
  EXPECT_EQ(late->Wait()->outcome(), DROPPED_LATE);
  const auto later = Push(Begin(1, 2));
  EXPECT_EQ(later->Wait()->step(), 2);
  ASSERT_TRUE(Commit(3, {}).ok());
  EXPECT_EQ(Push(Begin(1, 2))->Wait()->step(), 3);  // the newest decided: where to go on
  EXPECT_FALSE(shard_->BeginPush(Begin(0, 9)).ok());
  EXPECT_FALSE(shard_->BeginPush(Begin(7, 1)).ok());  // a rank the group does not have
  EXPECT_FALSE(shard_->BeginPush(Begin(0, 4, 1, /*generation=*/9)).ok());
  shard_->DropPush(**Stage(Begin(0, 4)), /*refused=*/false);
  shard_->DropPush(**Stage(Begin(0, 4)), /*refused=*/true);
  const auto waiting = Push(Begin(1, 4));

  const PushCounts zero = counts(0), one = counts(1);
  EXPECT_EQ(zero.begun(), 7);
  EXPECT_EQ(zero.applied(), 1);
  EXPECT_EQ(zero.duplicate(), 1);
  EXPECT_EQ(zero.dropped_late(), 1);
  EXPECT_EQ(zero.refused(), 3);
  EXPECT_EQ(zero.lost(), 1);
  EXPECT_EQ(zero.open(), 0);
  EXPECT_EQ(one.begun(), 4);
  EXPECT_EQ(one.rejected(), 1);
  EXPECT_EQ(one.dropped_late(), 2);
  EXPECT_EQ(one.open(), 1);
  EXPECT_EQ(counts(-1).refused(), 1);
  EXPECT_EQ(shard_->Probe().pushes_size(), 3);
  ASSERT_TRUE(Restore(2).ok());  // answered ABORTED
  EXPECT_EQ(waiting->Wait().status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(counts(1).open(), 0);
  EXPECT_EQ(counts(1).refused(), 1);
}

TEST_F(ShardTest, NormsAreThoseOfTheAverageOfTheDecision) {
  job_.mutable_training()->mutable_optimizer()->set_clip_norm(1);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  PrepareRequest request;
  request.set_generation(1);
  request.set_step(1);
  *request.add_contributors() = Of(0);
  const auto prepare = [&] {
    Answer<PrepareReply> answer;
    shard_->Prepare(request, answer.Catch());
    return answer.Wait();
  };
  EXPECT_EQ(prepare().status().code(), absl::StatusCode::kFailedPrecondition);  // not staged
  const auto first = Push(Begin(0, 1));
  const auto second = Push(Begin(1, 1));
  *request.add_contributors() = Of(1);
  for (int repeat = 0; repeat < 2; ++repeat) {  // asked again, it says the same
    const auto reply = prepare();
    ASSERT_TRUE(reply.ok()) << reply.status();
    ASSERT_EQ(reply->norms_size(), 2);
    EXPECT_EQ(reply->norms(0).tensor(), 0u);
    EXPECT_EQ(reply->norms(0).gradient_squared(), 4.0 * 160 * 128);
    EXPECT_EQ(reply->norms(0).weight_squared(), 0);  // was not asked for
    EXPECT_EQ(reply->norms(1).gradient_squared(), 4.0 * 128);
  }
  EXPECT_FALSE(first->come());
  ASSERT_TRUE(Commit(1, {Of(0), Of(1)}).ok());
  EXPECT_EQ(prepare().status().code(), absl::StatusCode::kFailedPrecondition);  // decided
  request.set_generation(2);
  EXPECT_EQ(prepare().status().code(), absl::StatusCode::kAborted);
}

TEST_F(ShardTest, LarsTakesNoStepWithoutNorms) {
  job_.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::LARS);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto push = Push(Begin(0, 1));
  const auto reply = Commit(1, {Of(0)});
  EXPECT_EQ(reply.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(reply.status().message()), HasSubstr("brings no norms"));
  EXPECT_FALSE(push->come());
  shard_->Drain();
  EXPECT_EQ(push->Wait().status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ShardTest, NewerIncarnationsReplaceOlderOnes) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto old = Push(Begin(0, 1, 1));
  const auto half = Stage(Begin(0, 1, 2));  // the next process dies in the middle
  ASSERT_TRUE(half.ok());
  EXPECT_EQ(Push(Begin(0, 1, 1))->Wait().status().code(), absl::StatusCode::kFailedPrecondition);
  const auto newest = Push(Begin(0, 1, 3));
  TensorChunk chunk;
  EXPECT_EQ((*half)->Place(chunk, 0).status().code(), absl::StatusCode::kAborted);
  // The leader had decided for the old one before it knew of the newest: that stands.
  ASSERT_TRUE(Commit(1, {Of(0, 1)}).ok());
  EXPECT_EQ(old->Wait()->outcome(), APPLIED);
  EXPECT_EQ(newest->Wait()->outcome(), DROPPED_LATE);
}

TEST_F(ShardTest, SamePushSentAgainTakesThePlaceOfTheFirst) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto first = Push(Begin(0, 1));
  const auto second = Push(Begin(0, 1));
  EXPECT_EQ(first->Wait().status().code(), absl::StatusCode::kAborted);
  ASSERT_TRUE(Commit(1, {Of(0)}).ok());
  EXPECT_EQ(second->Wait()->outcome(), APPLIED);
}

TEST_F(ShardTest, ReportsAreRepeatedUntilTheLeaderAnswers) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  leader_.set_answer(absl::UnavailableError("restarting"));
  const auto push = Push(Begin(0, 1));
  shard_->Tick();
  EXPECT_EQ(leader_.reports().size(), 2u);
  leader_.set_answer(absl::OkStatus());
  shard_->Tick();
  shard_->Tick();
  EXPECT_EQ(leader_.reports().size(), 3u);
  EXPECT_FALSE(push->come());
  // A refusal is the push's answer.
  leader_.set_answer(absl::FailedPreconditionError("incarnation 1 was replaced"));
  EXPECT_EQ(Push(Begin(1, 1))->Wait().status().code(), absl::StatusCode::kFailedPrecondition);
  shard_->Drain();
}

TEST_F(ShardTest, NewGenerationEndsEverythingOfTheOld) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto push = Push(Begin(0, 1));
  const auto half = Stage(Begin(1, 1));
  ASSERT_TRUE(half.ok());
  const auto pull = Pull([](PullRequest* r) { r->set_step(1); });
  ASSERT_TRUE(Restore(2).ok());
  EXPECT_EQ(push->Wait().status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(pull->Wait().status().code(), absl::StatusCode::kAborted);
  Answer<PushReply> late;
  shard_->EndPush(*half, PushEnd(), late.Catch());
  EXPECT_EQ(late.Wait().status().code(), absl::StatusCode::kAborted);
  EXPECT_EQ(Push(Begin(0, 1))->Wait().status().code(), absl::StatusCode::kAborted);
}

TEST_F(ShardTest, DrainAnswersWhatWaits) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto push = Push(Begin(0, 1));
  const auto pull = Pull([](PullRequest* r) { r->set_step(1); });
  shard_->Drain();
  EXPECT_EQ(push->Wait().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(pull->Wait().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Push(Begin(1, 1))->Wait().status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ShardTest, ParkedPullsAreBounded) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  std::vector<std::unique_ptr<Answer<std::unique_ptr<PullSource>>>> pulls;
  for (int i = 0; i < 24; ++i) {
    pulls.push_back(Pull([](PullRequest* r) { r->set_step(7); }));
    EXPECT_FALSE(pulls.back()->come());
  }
  const auto more = Pull([](PullRequest* r) { r->set_step(7); });
  const absl::Status refused = more->Wait().status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GT(RetryAfter(refused).value_or(absl::ZeroDuration()), absl::ZeroDuration());
  shard_->Drain();
}

TEST_F(ShardTest, BadPulls) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  EXPECT_EQ(Pull([](PullRequest*) {})->Wait().status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Pull([](PullRequest* r) { r->set_cut_step(7); })->Wait().status().code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(Pull([](PullRequest* r) {
              r->set_step(0);
              r->add_tensors(6);
            })
                ->Wait()
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Pull([](PullRequest* r) {
              r->set_step(0);
              r->set_shard_map_digest(1);
            })
                ->Wait()
                .status()
                .code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Pull([](PullRequest* r) { r->set_step(0); }, 7)->Wait().status().code(),
            absl::StatusCode::kAborted);
}

TEST_F(ShardTest, CheckpointAndBack) {
  job_.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
  Make();
  const std::string directory = JoinPath(directory_, "checkpoints", "alpha");
  ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory).ok());
  ASSERT_TRUE(Restore(1).ok());
  const auto push = Push(Begin(0, 1));
  ASSERT_TRUE(Commit(1, {Of(0)}, {}, false, /*checkpoint=*/true).ok());

  WriteCheckpointRequest request;
  request.set_generation(1);
  request.set_step(1);
  request.set_directory(directory);
  const auto write = [&] {
    Answer<WriteCheckpointReply> answer;
    shard_->WriteCheckpoint(request, answer.Catch());
    return answer.Wait();
  };
  disk_.FailWritesAfter(1000);
  const auto full = write();
  EXPECT_EQ(full.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.status().message()), HasSubstr("shard-0-of-1-1-1-0"));
  disk_.Heal();
  request.set_attempt(1);
  const auto written = write();
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->file_name(), "shard-0-of-1-1-1-1");
  // The answer was lost: the same file is told again, though the snapshot is gone.
  request.set_attempt(2);
  const auto again = write();
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->file_name(), written->file_name());
  EXPECT_EQ(again->crc32c(), written->crc32c());
  EXPECT_EQ(shard_->counters().checkpoints, 1);
  // A new snapshot of the step is another file.
  ASSERT_TRUE(Commit(1, {}, {}, false, /*checkpoint=*/true).ok());
  request.set_attempt(3);
  const auto anew = write();
  ASSERT_TRUE(anew.ok()) << anew.status();
  EXPECT_EQ(anew->file_name(), "shard-0-of-1-1-1-3");
  request.set_step(2);
  EXPECT_EQ(write().status().code(), absl::StatusCode::kNotFound);

  CheckpointManifest manifest;
  manifest.set_format_version(1);
  manifest.set_group("alpha");
  manifest.mutable_version()->set_generation(1);
  manifest.mutable_version()->set_step(1);
  manifest.set_shard_map_digest(ShardMapDigest(map_));
  *manifest.mutable_shard_map() = map_;
  manifest.add_files()->set_name(written->file_name());
  ASSERT_TRUE(WriteManifest(directory, manifest).ok());

  const auto before = Pull([](PullRequest* r) { r->set_step(1); });
  ASSERT_TRUE(before->Wait().ok());
  const float value = FirstOf(before->value->get());
  Make();  // another process
  const auto restored = Restore(2, "MANIFEST-1-1");
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(restored->step(), 1);
  const auto after = Pull([](PullRequest* r) { r->set_cut_step(1); }, 2);
  ASSERT_TRUE(after->Wait().ok());
  EXPECT_EQ(FirstOf(after->value->get()), value);

  auto bytes = ReadFile(JoinPath(directory, written->file_name()), 1 << 24);
  ASSERT_TRUE(bytes.ok());
  (*bytes)[bytes->size() / 2] ^= 1;
  ASSERT_TRUE(WriteFileAtomically(JoinPath(directory, written->file_name()), *bytes).ok());
  const auto damaged = Restore(3, "MANIFEST-1-1");
  EXPECT_EQ(damaged.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(damaged.status().message()), HasSubstr(written->file_name()));
  EXPECT_EQ(shard_->Probe().generation(), 0u);
  EXPECT_EQ(Restore(4, "MANIFEST-9-9").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ShardTest, AsyncRejectedPushOnlyCounts) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  job_.mutable_stop()->set_steps(3);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  const auto initial = Pull([](PullRequest* r) { r->set_cut_step(0); });
  ASSERT_TRUE(initial->Wait().ok());
  const float value = FirstOf(initial->value->get());
  for (int64_t step = 1; step <= 3; ++step) {
    const auto push = Push(Begin(0, step), /*finite=*/false);
    ASSERT_TRUE(push->Wait().ok()) << push->value.status();
    EXPECT_EQ(push->value->outcome(), REJECTED);
    EXPECT_EQ(push->value->step(), step);
    EXPECT_EQ(push->value->message(), "gradient of tensor w is not finite");
  }
  const auto late = Push(Begin(1, 1), /*finite=*/false);
  ASSERT_TRUE(late->Wait().ok());
  EXPECT_EQ(late->value->outcome(), DROPPED_LATE);
  const auto after = Pull([](PullRequest* r) { r->set_at_least_step(3); });
  ASSERT_TRUE(after->Wait().ok());
  EXPECT_EQ(FirstOf(after->value->get()), value);
  EXPECT_EQ(shard_->counters().rejected, 3);
  shard_.reset();  // all reports are out
  const auto reports = leader_.reports();
  ASSERT_EQ(reports.size(), 4u);
  EXPECT_EQ(reports[2].step(), 3);
  EXPECT_FALSE(reports[2].end().finite());
  EXPECT_EQ(reports[3].outcome(), DROPPED_LATE);
}

TEST_F(ShardTest, AsyncPushesThatComeAgainAreAnsweredAsBefore) {
  job_.mutable_training()->set_update_mode(TrainingConfig::ASYNC);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  EXPECT_EQ(Push(Begin(0, 1))->Wait()->outcome(), APPLIED);
  EXPECT_EQ(Push(Begin(0, 2), /*finite=*/false)->Wait()->outcome(), REJECTED);
  const auto again = Push(Begin(0, 2), /*finite=*/false);
  EXPECT_EQ(again->Wait()->outcome(), REJECTED);
  EXPECT_EQ(again->value->message(), "gradient of tensor w is not finite");
  EXPECT_EQ(again->value->step(), 2);
  EXPECT_EQ(Push(Begin(0, 1))->Wait()->outcome(), DUPLICATE);
  EXPECT_EQ(shard_->state().step, 2);
  shard_.reset();
  const auto reports = leader_.reports();
  ASSERT_EQ(reports.size(), 2u);  // each decision once
  EXPECT_EQ(reports[0].own_step(), 1);
  EXPECT_EQ(reports[0].outcome(), APPLIED);
  EXPECT_EQ(reports[1].outcome(), REJECTED);
}

TEST_F(ShardTest, PushesBeyondTheBoundAreTooStaleAndChangeNothing) {
  job_.mutable_training()->set_update_mode(TrainingConfig::BOUNDED_STALENESS);
  job_.mutable_training()->set_max_staleness(2);
  Make();
  ASSERT_TRUE(Restore(1).ok());
  for (int64_t step = 1; step <= 4; ++step) {
    EXPECT_EQ(Push(Begin(0, step))->Wait()->outcome(), APPLIED);
  }
  const auto before = Pull([](PullRequest* r) { r->set_at_least_step(4); });
  ASSERT_TRUE(before->Wait().ok());
  const float value = FirstOf(before->value->get());
  const auto stale = Push(Begin(1, 1));  // three steps behind
  ASSERT_TRUE(stale->Wait().ok());
  EXPECT_EQ(stale->value->outcome(), TOO_STALE);
  EXPECT_EQ(stale->value->step(), 4);
  EXPECT_THAT(stale->value->message(), HasSubstr("is 3 steps behind the furthest, 4"));
  EXPECT_EQ(shard_->state().step, 4);
  EXPECT_EQ(FirstOf(before->value->get()), value);
  EXPECT_EQ(Push(Begin(1, 1))->Wait()->outcome(), TOO_STALE);  // as before
  EXPECT_EQ(Push(Begin(1, 2))->Wait()->outcome(), APPLIED);
  EXPECT_EQ(shard_->counters().too_stale, 1);
  EXPECT_EQ(shard_->counters().max_staleness, 2);
  EXPECT_EQ(shard_->counters().max_update_lag, 4);
}

// Many pushes, pulls and restores at once: every call is answered, and nothing is left behind.
TEST_F(ShardTest, EverythingAtOnce) {
  Make();
  ASSERT_TRUE(Restore(1).ok());
  std::vector<std::unique_ptr<Answer<PushReply>>> pushes;
  std::vector<std::unique_ptr<Answer<std::unique_ptr<PullSource>>>> pulls;
  std::vector<std::unique_ptr<Answer<RestoreReply>>> restores;
  for (uint64_t generation = 1; generation <= 20; ++generation) {
    pushes.push_back(Push(Begin(0, 1, 1, generation)));
    pulls.push_back(Pull([](PullRequest* r) { r->set_step(1); }, generation));
    RestoreRequest request;
    request.set_generation(generation + 1);
    request.set_leader_nonce(1);
    request.set_shard_map_digest(ShardMapDigest(map_));
    restores.push_back(std::make_unique<Answer<RestoreReply>>());
    shard_->Restore(request, restores.back()->Catch());
  }
  for (const auto& restore : restores) EXPECT_TRUE(restore->Wait().ok());
  shard_->Drain();
  for (const auto& push : pushes) EXPECT_FALSE(push->Wait().ok());
  for (const auto& pull : pulls) EXPECT_FALSE(pull->Wait().ok());
  EXPECT_EQ(shard_->counters().parked_calls, 0);
}

}  // namespace
}  // namespace codistill
