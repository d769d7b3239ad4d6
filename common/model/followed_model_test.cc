#include "common/model/followed_model.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/client/fake_leader.h"
#include "common/client/fake_shards.h"
#include "common/config/shard_map.h"
#include "common/model/test_archive.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;
using Snapshot = std::shared_ptr<const FollowedModel::Snapshot>;

constexpr int kShards = 2;

// A linear model of one output on two shards, whose bias alone tells the cuts apart.
class FollowedModelTest : public testing::Test {
 protected:
  FollowedModelTest()
      : list_(*LoadTensorList(Folder() + "/alpha.tensors.textproto")),
        map_(*BuildShardMap(list_, kShards)),
        shards_(map_) {
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        absl::StrCat("name: 'test' model { archive_dir: '", Folder(),
                     "' inputs { name: 'x' shape: 2 } num_outputs: 1 label_loss: SQUARED_ERROR }"
                     "groups { name: 'alpha' shards { address: '",
                     leader_.address(), "' } shards { address: 'unused:1' } }"),
        &options_.job));
  }

  static std::string Folder() {
    static const std::string folder =
        ExportForTest("alpha", "mlp", {"in_features=2", "hidden=", "num_classes=1"});
    return folder;
  }

  void Follow() {
    auto followed = FollowedModel::Create(options_);
    ASSERT_TRUE(followed.ok()) << followed.status();
    followed_ = *std::move(followed);
  }

  // Makes a cut whose model answers `value` to zeros.
  void Put(uint64_t generation, int64_t step, float value) {
    const float weight[] = {1, 1};
    shards_.Put(generation, step,
                {std::string(reinterpret_cast<const char*>(weight), sizeof(weight)),
                 std::string(reinterpret_cast<const char*>(&value), sizeof(value))});
  }

  GroupState State(uint64_t generation, int64_t step) {
    GroupState state;
    state.set_phase(GroupState::TRAINING);
    state.mutable_version()->set_generation(generation);
    state.mutable_version()->set_step(step + 3);
    state.mutable_newest_cut()->set_generation(generation);
    state.mutable_newest_cut()->set_step(step);
    for (const std::string& address : shards_.addresses()) state.add_shard_addresses(address);
    state.set_shard_map_digest(ShardMapDigest(map_));
    *state.mutable_shard_map() = map_;
    return state;
  }

  void Publish(uint64_t generation, int64_t step, float value) {
    Put(generation, step, value);
    leader_.Tell(State(generation, step));
  }

  Snapshot WaitForNewer(uint64_t generation, int64_t step) {
    Version than;
    than.set_generation(generation);
    than.set_step(step);
    auto snapshot = followed_->WaitForNewer(than, absl::Now() + absl::Seconds(30));
    EXPECT_TRUE(snapshot.ok()) << snapshot.status();
    return snapshot.ok() ? *snapshot : nullptr;
  }

  // Waits until exactly this version is held.
  Snapshot WaitFor(uint64_t generation, int64_t step) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (absl::Now() < deadline) {
      const auto held = followed_->Get();
      if (held.ok() && (*held)->version.generation() == generation &&
          (*held)->version.step() == step) {
        return *held;
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
    ADD_FAILURE() << "never held " << generation << "." << step << ": "
                  << followed_->Get().status();
    return nullptr;
  }

  static float Answer(const Snapshot& snapshot) {
    const auto logits = snapshot->model->Predict({Tensor::Zeros(DT_FLOAT, {1, 2})}, nullptr);
    EXPECT_TRUE(logits.ok()) << logits.status();
    return logits->values.As<float>()[0];
  }

  const TensorList list_;
  const ShardMap map_;
  FakeShards shards_;
  FakeLeader leader_;
  FollowedModel::Options options_;
  std::unique_ptr<FollowedModel> followed_;
};

TEST_F(FollowedModelTest, LoadsTheInitialWeightsAndThenEveryNewerCut) {
  Follow();
  EXPECT_TRUE(absl::IsUnavailable(followed_->Get().status()));
  EXPECT_THAT(std::string(followed_->Get().status().message()), HasSubstr("group alpha"));
  Publish(1, 0, 10);
  const Snapshot first = WaitForNewer(0, 0);
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(first->version.generation(), 1u);
  EXPECT_EQ(first->version.step(), 0);
  EXPECT_LE(first->loaded_at, absl::Now());
  EXPECT_EQ(Answer(first), 10);
  Publish(1, 50, 11);
  const Snapshot second = WaitForNewer(1, 0);
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(second->version.step(), 50);
  EXPECT_EQ(Answer(second), 11);
  EXPECT_EQ(Answer(first), 10);  // what is held stays as it is
  EXPECT_EQ((*followed_->Get())->version.step(), 50);
  EXPECT_EQ(followed_->group_state().version().step(), 53);
  EXPECT_LT(followed_->group_silence(), absl::Seconds(30));
  EXPECT_EQ(followed_->counters().swaps, 2);
  EXPECT_EQ(followed_->counters().failed_loads, 0);
  EXPECT_GT(followed_->counters().pull_bytes, 24u);
  // Nothing newer: the wait ends at its deadline.
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      followed_->WaitForNewer(second->version, absl::Now() + absl::Milliseconds(50)).status()));
}

TEST_F(FollowedModelTest, VersionsInUseAreNeverWrittenInto) {
  Follow();
  std::vector<Snapshot> held;
  for (int i = 1; i <= 2; ++i) {
    Publish(1, i, static_cast<float>(i));
    held.push_back(WaitFor(1, i));
  }
  // Two are in use here, the third copy takes all that follows... until it is held, too.
  Publish(1, 3, 3);
  held.push_back(WaitFor(1, 3));
  Publish(1, 4, 4);
  Publish(1, 5, 5);
  while (followed_->group_state().newest_cut().step() != 5) absl::SleepFor(absl::Milliseconds(1));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Answer(held[i]), i + 1);
  EXPECT_EQ((*followed_->Get())->version.step(), 3);
  held[0].reset();  // its memory may now be read into
  const Snapshot newest = WaitFor(1, 5);
  EXPECT_EQ(Answer(newest), 5);
  EXPECT_EQ(Answer(held[1]), 2);
  EXPECT_EQ(Answer(held[2]), 3);
  EXPECT_EQ(followed_->counters().swaps, 4) << "4 was passed over while there was no room for it";
}

TEST_F(FollowedModelTest, SnapshotsOutliveTheFollower) {
  Follow();
  Publish(1, 7, 7);
  const Snapshot snapshot = WaitFor(1, 7);
  followed_.reset();
  EXPECT_EQ(Answer(snapshot), 7);
}

TEST_F(FollowedModelTest, GoesForTheNewestWhereACutIsGone) {
  Follow();
  Publish(1, 1, 1);
  WaitFor(1, 1);
  leader_.Tell(State(1, 2));  // dropped by the shards before we came
  const int before = shards_.pulls();
  while (shards_.pulls() == before) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(Answer(*followed_->Get()), 1);
  Publish(1, 3, 3);
  EXPECT_EQ(Answer(WaitFor(1, 3)), 3);
  EXPECT_EQ(followed_->counters().swaps, 2);
  EXPECT_EQ(followed_->counters().failed_loads, 0);
}

TEST_F(FollowedModelTest, AnotherGenerationTakesOverEvenWithASmallerStep) {
  Follow();
  Publish(1, 100, 1);
  WaitFor(1, 100);
  Publish(2, 60, 2);
  const Snapshot snapshot = WaitForNewer(1, 100);
  ASSERT_NE(snapshot, nullptr);
  EXPECT_EQ(snapshot->version.generation(), 2u);
  EXPECT_EQ(Answer(snapshot), 2);
}

TEST_F(FollowedModelTest, WantedCutsComeOneByOne) {
  options_.wants = [](int64_t step) { return step % 100 == 0; };
  Follow();
  for (int step : {50, 100, 150, 200, 250, 300, 350}) {
    Publish(1, step, static_cast<float>(step));
    // Each is heard of before the next is told; a leader that is too fast shows only its newest.
    while (followed_->group_state().newest_cut().step() != step) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  int64_t seen = 0;
  for (int step : {100, 200, 300}) {
    const Snapshot snapshot = WaitForNewer(1, seen);
    ASSERT_NE(snapshot, nullptr);
    seen = snapshot->version.step();
    EXPECT_EQ(seen, step);
    EXPECT_EQ(Answer(snapshot), step);
  }
}

TEST_F(FollowedModelTest, KeepsTheOldVersionUntilTheNewOneIsWhole) {
  Follow();
  Publish(1, 1, 1);
  WaitFor(1, 1);
  shards_.set_pull_filter([](int, int, TensorFrame* frame) {
    return !frame->header().has_pull_end();  // every stream is cut short
  });
  Publish(1, 2, 2);
  while (followed_->counters().failed_loads < 2) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ((*followed_->Get())->version.step(), 1);
  EXPECT_EQ(Answer(*followed_->Get()), 1);
  shards_.set_pull_filter(nullptr);
  EXPECT_EQ(Answer(WaitFor(1, 2)), 2);
}

// Whatever is not exactly the tensors that were announced is refused, and read again.
TEST_F(FollowedModelTest, RefusesADamagedCut) {
  const std::pair<const char*, std::function<bool(TensorFrame*)>> damages[] = {
      {"of 2 elements of tensor fc1.weight came",
       [](TensorFrame* frame) {
         return !frame->header().has_chunk() || frame->header().chunk().tensor() != 0;
       }},
      {"the values",
       [](TensorFrame* frame) {
         if (frame->header().has_chunk()) frame->mutable_payload()->pop_back();
         return true;
       }},
      {"tensor 77",
       [](TensorFrame* frame) {
         if (frame->header().has_chunk()) frame->mutable_header()->mutable_chunk()->set_tensor(77);
         return true;
       }},
      {"payload for chunks",
       [](TensorFrame* frame) {
         if (!frame->header().has_chunk()) return true;
         TensorChunk* const chunk = frame->mutable_header()->mutable_chunk();
         if (chunk->tensor() == 0) chunk->set_count(1);
         return true;
       }},
      {"INT32",
       [](TensorFrame* frame) {
         if (frame->header().has_chunk()) {
           frame->mutable_header()->mutable_chunk()->set_dtype(DT_INT32);
         }
         return true;
       }},
  };
  Follow();
  Publish(1, 1, 1);
  WaitFor(1, 1);
  int64_t step = 1;
  for (const auto& [message, damage] : damages) {
    SCOPED_TRACE(message);
    shards_.set_pull_filter(
        [&damage = damage](int, int, TensorFrame* frame) { return damage(frame); });
    const int64_t failed = followed_->counters().failed_loads;
    ++step;
    Publish(1, step, static_cast<float>(step));
    while (followed_->counters().failed_loads == failed) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_THAT(followed_->counters().last_load_error, HasSubstr(absl::StrCat("cut 1.", step)));
    EXPECT_THAT(followed_->counters().last_load_error, HasSubstr(message));
    EXPECT_EQ(Answer(*followed_->Get()), static_cast<float>(step - 1));
    shards_.set_pull_filter(nullptr);
    EXPECT_EQ(Answer(WaitFor(1, step)), static_cast<float>(step));
    EXPECT_EQ(followed_->counters().last_load_error, "");
  }
}

TEST_F(FollowedModelTest, SaysWhyNothingIsLoaded) {
  Follow();
  GroupState state = State(1, 1);
  state.mutable_shard_map()->mutable_tensors(1)->set_name("other");
  state.set_shard_map_digest(ShardMapDigest(state.shard_map()));
  leader_.Tell(state);
  while (followed_->counters().failed_loads == 0) absl::SleepFor(absl::Milliseconds(1));
  const std::string message(followed_->Get().status().message());
  EXPECT_THAT(message, HasSubstr("not those of our archive"));
  EXPECT_THAT(message, HasSubstr("other"));
}

TEST_F(FollowedModelTest, RefusesWeightsThatAreNotFinite) {
  Follow();
  Publish(1, 1, 1);
  WaitFor(1, 1);
  int64_t failed = 0;
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    ++failed;
    Publish(1, 1 + failed, bad);
    while (followed_->counters().failed_loads < failed) absl::SleepFor(absl::Milliseconds(1));
    const FollowedModel::Counters counters = followed_->counters();
    EXPECT_THAT(counters.last_load_error,
                HasSubstr(absl::StrCat("cut 1.", 1 + failed, ": tensor fc1.bias has ")));
    EXPECT_EQ(Answer(*followed_->Get()), 1);
  }
  // It is not read again, and the next good one is taken.
  const int pulls = shards_.pulls();
  Publish(1, 9, 9);
  EXPECT_EQ(Answer(WaitFor(1, 9)), 9);
  EXPECT_EQ(shards_.pulls(), pulls + kShards);
  EXPECT_EQ(followed_->counters().failed_loads, 2);
  EXPECT_EQ(followed_->counters().last_load_error, "");
}

TEST_F(FollowedModelTest, WhoWantsACertainCutJudgesItHimself) {
  options_.wants = [](int64_t) { return true; };
  Follow();
  Publish(1, 1, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(std::isnan(Answer(WaitForNewer(0, 0))));
}

TEST_F(FollowedModelTest, HoldsOlderVersionsOfItsGenerationOnly) {
  options_.held_versions = 3;
  Follow();
  const auto held = [this] {
    std::string all;
    for (const Snapshot& snapshot : followed_->Held()) {
      EXPECT_EQ(Answer(snapshot), static_cast<float>(snapshot->version.step()));
      absl::StrAppend(&all, snapshot->version.generation(), ".", snapshot->version.step(), " ");
    }
    return all;
  };
  EXPECT_EQ(held(), "");
  for (int i = 1; i <= 5; ++i) {
    Publish(1, i, static_cast<float>(i));
    WaitFor(1, i);
  }
  EXPECT_EQ(held(), "1.5 1.4 1.3 ");
  // Beside what is held there is room for one in use and one that loads.
  const Snapshot in_use = followed_->Held()[2];
  Publish(1, 6, 6);
  WaitFor(1, 6);
  EXPECT_EQ(held(), "1.6 1.5 1.4 ");
  EXPECT_EQ(Answer(in_use), 3);
  Publish(2, 4, 4);
  WaitFor(2, 4);
  EXPECT_EQ(held(), "2.4 ");
}

TEST_F(FollowedModelTest, RoundsWeightsButNotBiases) {
  const std::pair<DataType, float> cases[] = {{DT_FLOAT, 1.003f + 0.7f},
                                              {DT_BFLOAT16, 1.0f + 0.69921875f},
                                              // One scale for the row of the one output.
                                              {DT_INT8, 1.003f + 89 * 1.003f / 127}};
  for (const auto& [weights, sum] : cases) {
    options_.weights = weights;
    Follow();
    const float weight[] = {1.003f, 0.7f};
    const float bias = 0.3337f;
    shards_.Put(1, 1,
                {std::string(reinterpret_cast<const char*>(weight), sizeof(weight)),
                 std::string(reinterpret_cast<const char*>(&bias), sizeof(bias))});
    leader_.Tell(State(1, 1));
    const Snapshot snapshot = WaitFor(1, 1);
    ASSERT_NE(snapshot, nullptr);
    EXPECT_EQ(snapshot->precision, weights);
    EXPECT_EQ(Answer(snapshot), bias);
    const auto logits = snapshot->model->Predict({FloatTensor({1, 2}, {1, 1})}, nullptr);
    EXPECT_NEAR(logits->values.As<float>()[0] - bias, sum, 2e-6) << DataType_Name(weights);
  }
  // A pass in bfloat16 rounds what it multiplies, and says so.
  options_.precision = BF16;
  for (const DataType weights : {DT_FLOAT, DT_BFLOAT16, DT_INT8}) {
    options_.weights = weights;
    Follow();
    Publish(1, 1, 0.3337f);
    const Snapshot snapshot = WaitFor(1, 1);
    ASSERT_NE(snapshot, nullptr);
    EXPECT_EQ(snapshot->precision, weights == DT_FLOAT ? DT_BFLOAT16 : weights);
    EXPECT_NE(Answer(snapshot), 0.3337f);
    EXPECT_NEAR(Answer(snapshot), 0.3337f, 2e-3);
  }
  options_.precision = FP32;
  options_.weights = DT_HALF;
  EXPECT_THAT(std::string(FollowedModel::Create(options_).status().message()),
              HasSubstr("prediction.weights: DT_HALF"));
}

TEST_F(FollowedModelTest, EndsAtOnceWhileItLoads) {
  shards_.set_hang(true);
  Follow();
  Publish(1, 1, 1);
  while (shards_.pulls() < kShards) absl::SleepFor(absl::Milliseconds(1));
  const absl::Time start = absl::Now();
  followed_.reset();
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

TEST_F(FollowedModelTest, RefusesAJobWithoutAnArchiveOrALeader) {
  FollowedModel::Options options = options_;
  options.group = 1;
  EXPECT_TRUE(absl::IsInvalidArgument(FollowedModel::Create(options).status()));
  options = options_;
  options.job.mutable_groups(0)->clear_shards();
  EXPECT_THAT(std::string(FollowedModel::Create(options).status().message()),
              HasSubstr("group alpha has no address in shards[0]"));
  options = options_;
  options.job.mutable_model()->set_archive_dir("/nowhere");
  EXPECT_TRUE(absl::IsNotFound(FollowedModel::Create(options).status()));
}

}  // namespace
}  // namespace codistill
