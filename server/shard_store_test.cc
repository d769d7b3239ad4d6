#include "server/shard_store.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/fault_injecting_file_system.h"
#include "common/base/simulated_clock.h"
#include "common/tensor/bfloat16.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/pull_source.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

// Every element of every pushed parameter is `gradient`; mean is `mean`, count is `count`.
struct Values {
  float gradient = 0, mean = 0;
  int64_t count = 0;
};

// A non-owning pointer for sources that live shorter than the test's store.
std::shared_ptr<const ShardStore> Borrow(const std::unique_ptr<ShardStore>& store) {
  return std::shared_ptr<const ShardStore>(std::shared_ptr<void>(), store.get());
}

class ShardStoreTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ =
        JoinPath(testing::TempDir(), testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(WriteTestModel(directory_));
    map_ = BuildShardMap(TestTensors(), 1).value();
    optimizer_.set_kind(OptimizerConfig::SGD);
  }

  std::unique_ptr<ShardStore> MakeStore(int held_cuts = 2, const ShardMap* map = nullptr,
                                        int shard = 0) {
    ShardStore::Options options;
    options.map = map == nullptr ? map_ : *map;
    options.shard = shard;
    options.optimizer = optimizer_;
    options.held_cuts = held_cuts;
    options.max_live_reads = max_live_reads_;
    options.clock = clock_;
    auto store = ShardStore::Create(options);
    EXPECT_TRUE(store.ok()) << store.status();
    return *std::move(store);
  }

  std::unique_ptr<ShardStore> LoadedStore(int held_cuts = 2) {
    auto store = MakeStore(held_cuts);
    const absl::Status status = Load(store.get());
    EXPECT_TRUE(status.ok()) << status;
    return store;
  }

  absl::Status Load(ShardStore* store, const std::string& warm = "") {
    return store->LoadInitial(JoinPath(directory_, "alpha.safetensors"), warm, FileSystem::Real());
  }

  std::shared_ptr<StagedPush> Push(const ShardStore& store, const Values& values) {
    auto push = store.NewPush(PushBegin());
    for (const ShardPiece& piece : store.layout().pieces()) {
      if (piece.role == TensorSpec::FROZEN) continue;
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_begin(piece.piece.begin());
      chunk.set_count(piece.piece.count());
      chunk.set_dtype(piece.dtype);
      const bool parameter = piece.role == TensorSpec::PARAMETER;
      chunk.set_content(parameter ? TensorChunk::GRADIENT : TensorChunk::VALUE);
      void* const place = push->Place(chunk, piece.bytes).value();
      if (piece.dtype == DT_INT64) {
        std::memcpy(place, &values.count, sizeof(values.count));
      } else {
        float* const to = static_cast<float*>(place);
        std::fill(to, to + piece.piece.count(), parameter ? values.gradient : values.mean);
      }
    }
    EXPECT_TRUE(push->CheckComplete().ok());
    return push;
  }

  // Element `i` of a FLOAT tensor as it is now.
  float Live(const ShardStore& store, int tensor, int64_t i) {
    const int piece = store.layout().Find(tensor, i, 1).value();
    float value = 0;
    Read(store, *LiveOf(store), piece, i, 1, &value);
    return value;
  }
  int64_t Count(const ShardStore& store) {
    int64_t value = 0;
    Read(store, *LiveOf(store), store.layout().Find(5, 0, 1).value(), 0, 1, &value);
    return value;
  }
  static std::shared_ptr<const Cut> LiveOf(const ShardStore& store) {
    // Who only looks may do so through a store that others see as constant.
    return const_cast<ShardStore&>(store).Live(store.step(), true);
  }
  static void Read(const ShardStore& store, const Cut& cut, int piece, int64_t begin, int64_t count,
                   void* to) {
    const absl::Status status = store.ReadElements(cut, piece, begin, count, to);
    ASSERT_TRUE(status.ok()) << status;
  }

  static ShardStore::Update Step(int64_t step, double rate = 0.5, double decay = 0) {
    return {step, rate, decay, 1.0, {}};
  }

  std::string directory_;
  ShardMap map_;
  OptimizerConfig optimizer_;
  int max_live_reads_ = 4;
  Clock* clock_ = Clock::Real();
};

TEST_F(ShardStoreTest, LoadsInitialWeights) {
  const auto store = LoadedStore();
  EXPECT_EQ(store->step(), 0);
  EXPECT_EQ(Live(*store, 0, 20479), TestValue("w", 20479));
  EXPECT_EQ(Live(*store, 3, 2), TestValue("fixed", 2));
  EXPECT_EQ(Count(*store), 5);
}

TEST_F(ShardStoreTest, WarmStartReplacesWhatItHas) {
  const std::string warm = JoinPath(directory_, "warm.safetensors");
  ASSERT_TRUE(WriteFileAtomically(warm, SafetensorsBytes({{"b", std::vector<float>(128, 9)},
                                                          {"of another model", {1, 2}}}))
                  .ok());
  auto store = MakeStore();
  ASSERT_TRUE(Load(store.get(), warm).ok());
  EXPECT_EQ(Live(*store, 1, 5), 9);
  EXPECT_EQ(Live(*store, 0, 5), TestValue("w", 5));

  ASSERT_TRUE(WriteFileAtomically(warm, SafetensorsBytes({{"b", {1, 2, 3}}})).ok());
  absl::Status status = Load(store.get(), warm);
  EXPECT_THAT(std::string(status.message()), HasSubstr("tensor b is FP32[3]; the model's"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("warm.safetensors"));
  ASSERT_TRUE(WriteFileAtomically(warm, SafetensorsBytes({{"other", {1}}})).ok());
  EXPECT_THAT(std::string(Load(store.get(), warm).message()), HasSubstr("no tensor of the model"));
}

TEST_F(ShardStoreTest, MissingTensorIsNamed) {
  const std::string path = JoinPath(directory_, "alpha.safetensors");
  ASSERT_TRUE(
      WriteFileAtomically(path, SafetensorsBytes({{"b", std::vector<float>(128, 9)}})).ok());
  auto store = MakeStore();
  const absl::Status status = Load(store.get());
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("has no tensor w"));
  ASSERT_TRUE(FileSystem::Real()->RemoveFile(path).ok());
  EXPECT_THAT(std::string(Load(store.get()).message()), HasSubstr(path));
}

// A push that is the only one of its step, taken in pieces of any size, gives the same bits as one
// that is put aside first.
class EarlyUpdateTest : public ShardStoreTest,
                        public testing::WithParamInterface<OptimizerConfig::Kind> {
 protected:
  // A slot of a piece in a snapshot.
  static std::string SlotBytes(const ShardStore& store, const ShardStore::Snapshot& snapshot,
                               size_t slot, const ShardPiece& piece) {
    std::string bytes;
    for (uint64_t at = piece.offset; at < piece.offset + piece.bytes; ++at) {
      bytes += static_cast<char>(
          snapshot.slots[slot][at / store.block_bytes()].data()[at % store.block_bytes()]);
    }
    return bytes;
  }
};

TEST_P(EarlyUpdateTest, IsTheUpdate) {
  optimizer_.set_kind(GetParam());
  const auto store = LoadedStore();
  const auto reference = LoadedStore();
  std::vector<float> gradient(1 << 20);
  for (size_t i = 0; i < gradient.size(); ++i) {
    gradient[i] = static_cast<float>(i % 977) * 0.01f - 3;
  }
  const auto bytes_of = [&](const ShardPiece& piece) {
    return reinterpret_cast<const uint8_t*>(gradient.data() + piece.piece.tensor());
  };
  const int64_t count = 11;
  for (int64_t step = 1; step <= 3; ++step) {
    const ShardStore::Update update = Step(step, 0.3 / step, 0.01);
    const auto early = store->NewEarlyPush(PushBegin(), update);
    ASSERT_NE(early, nullptr);
    const auto staged = reference->NewPush(PushBegin());
    for (const ShardPiece& piece : store->layout().pieces()) {
      if (piece.role == TensorSpec::FROZEN) continue;
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_dtype(piece.dtype);
      chunk.set_content(piece.role == TensorSpec::PARAMETER ? TensorChunk::GRADIENT
                                                            : TensorChunk::VALUE);
      const uint8_t* const from =
          piece.dtype == DT_INT64 ? reinterpret_cast<const uint8_t*>(&count) : bytes_of(piece);
      const auto copy_out = [&](size_t offset) {
        return [&, offset](size_t begin, size_t size, void* to) {
          std::memcpy(to, from + offset + begin, size);
        };
      };
      // Every other part lies together where it arrived, on a boundary of its own.
      std::string arrived;
      const auto view_out = [&](size_t offset) {
        return [&, offset](size_t begin, size_t size) -> absl::Span<const uint8_t> {
          // Parts of several sizes; of some there are but a few bytes.
          size = std::min(size, begin % 3 == 0 ? size_t{7} : begin % 20011 + 3);
          arrived = "?" + std::string(reinterpret_cast<const char*>(from + offset + begin), size);
          return {reinterpret_cast<const uint8_t*>(arrived.data()) + 1, size};
        };
      };
      const int64_t half = (piece.piece.count() + 1) / 2;
      for (const int64_t first : {half, int64_t{0}}) {
        const int64_t n = first == 0 ? half : piece.piece.count() - half;
        if (n == 0) continue;
        chunk.set_begin(piece.piece.begin() + first);
        chunk.set_count(n);
        const size_t bytes = n * piece.element_size;
        const size_t offset = first * piece.element_size;
        ASSERT_TRUE(early->Take(chunk, bytes, copy_out(offset), view_out(offset)).ok());
        ASSERT_TRUE(staged->Take(chunk, bytes, copy_out(offset), view_out(offset)).ok());
      }
      // What came twice is refused all the same.
      EXPECT_FALSE(early->Take(chunk, half * piece.element_size, copy_out(0), view_out(0)).ok());
    }
    EXPECT_TRUE(early->CheckComplete().ok());
    // Nothing shows before the decision.
    EXPECT_EQ(store->step(), step - 1);
    const auto before = LiveOf(*store);
    for (const ShardPiece& piece : store->layout().pieces()) {
      std::vector<uint8_t> a(piece.bytes), b(piece.bytes);
      const int index = store->layout().Find(piece.piece.tensor(), piece.piece.begin(), 1).value();
      Read(*store, *before, index, piece.piece.begin(), piece.piece.count(), a.data());
      Read(*reference, *LiveOf(*reference), index, piece.piece.begin(), piece.piece.count(),
           b.data());
      EXPECT_EQ(a, b) << piece.name;
    }
    const ShardStore::Contribution contribution = {early.get(), 7};
    EXPECT_TRUE(store->CanApply(update, {contribution}));
    store->Apply(update, {contribution});
    reference->Apply(update, {{staged.get(), 7}});
    EXPECT_EQ(store->step(), step);
    EXPECT_EQ(Count(*store), 11);
    for (const ShardPiece& piece : store->layout().pieces()) {
      std::vector<uint8_t> a(piece.bytes), b(piece.bytes);
      const int index = store->layout().Find(piece.piece.tensor(), piece.piece.begin(), 1).value();
      Read(*store, *LiveOf(*store), index, piece.piece.begin(), piece.piece.count(), a.data());
      Read(*reference, *LiveOf(*reference), index, piece.piece.begin(), piece.piece.count(),
           b.data());
      EXPECT_EQ(a, b) << piece.name << " after step " << step;
    }
    store->TakeSnapshot(step);
    reference->TakeSnapshot(step);
    const auto slots = store->snapshot(step), expected = reference->snapshot(step);
    for (size_t s = 0; s < slots->slots.size(); ++s) {
      for (const ShardPiece& piece : store->layout().pieces()) {
        if (piece.role != TensorSpec::PARAMETER) continue;
        EXPECT_EQ(SlotBytes(*store, *slots, s, piece), SlotBytes(*reference, *expected, s, piece))
            << "slot " << s << " of " << piece.name << " after step " << step;
      }
    }
    // A reader of the step before still has it.
    float old = 0;
    Read(*store, *before, store->layout().Find(0, 77, 1).value(), 77, 1, &old);
    EXPECT_NE(old, Live(*store, 0, 77));
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, EarlyUpdateTest,
                         testing::Values(OptimizerConfig::SGD, OptimizerConfig::MOMENTUM,
                                         OptimizerConfig::ADAGRAD, OptimizerConfig::ADAMW),
                         [](const auto& info) { return OptimizerConfig::Kind_Name(info.param); });

TEST_F(ShardStoreTest, EarlyUpdatesAreForStepsThatNothingElseChanges) {
  const auto store = LoadedStore();
  EXPECT_EQ(store->NewEarlyPush(PushBegin(), Step(2)), nullptr);  // of values not there yet
  const auto early = store->NewEarlyPush(PushBegin(), Step(1, 0.5));
  ASSERT_NE(early, nullptr);
  const auto other = Push(*store, {1, 1, 1});
  // Decided otherwise than it was taken: refused before anything changes.
  EXPECT_FALSE(store->CanApply(Step(1, 0.25), {{early.get(), 1}}));
  EXPECT_FALSE(store->CanApply(Step(2, 0.5), {{early.get(), 1}}));
  EXPECT_FALSE(store->CanApply(Step(1, 0.5, 0.1), {{early.get(), 1}}));
  EXPECT_FALSE(store->CanApply(Step(1, 0.5), {{early.get(), 1}, {other.get(), 1}}));
  EXPECT_TRUE(store->CanApply(Step(1, 0.5), {{early.get(), 1}}));
  EXPECT_TRUE(store->CanApply(Step(1, 0.25), {{other.get(), 1}}));

  optimizer_.set_kind(OptimizerConfig::LARS);  // wants the norms of whole tensors first
  EXPECT_EQ(LoadedStore()->NewEarlyPush(PushBegin(), Step(1)), nullptr);
  optimizer_.set_kind(OptimizerConfig::SGD);
  optimizer_.set_clip_norm(1);
  EXPECT_EQ(LoadedStore()->NewEarlyPush(PushBegin(), Step(1)), nullptr);
}

TEST_F(ShardStoreTest, AnAbandonedEarlyUpdateLeavesNothing) {
  const auto store = LoadedStore();
  const uint64_t held = store->memory().held_bytes;
  auto early = store->NewEarlyPush(PushBegin(), Step(1));
  ASSERT_NE(early, nullptr);
  TensorChunk chunk;
  chunk.set_tensor(1);
  chunk.set_count(128);
  chunk.set_dtype(DT_FLOAT);
  chunk.set_content(TensorChunk::GRADIENT);
  ASSERT_TRUE(early
                  ->Take(
                      chunk, 512,
                      [](size_t, size_t size, void* to) { std::memset(to, 0x7f, size); },
                      [](size_t, size_t) { return absl::Span<const uint8_t>(); })
                  .ok());
  // A whole step is made meanwhile, of another push of the same rank.
  const auto other = Push(*store, {1.0f, 10.0f, 3});
  store->Apply(Step(1), {{other.get(), 1}});
  EXPECT_FLOAT_EQ(Live(*store, 1, 5), TestValue("b", 5) - 0.5f);
  early.reset();
  EXPECT_FLOAT_EQ(Live(*store, 1, 5), TestValue("b", 5) - 0.5f);
  EXPECT_EQ(store->memory().held_bytes, held);
}

TEST_F(ShardStoreTest, AveragesByExampleCount) {
  const auto store = LoadedStore();
  const auto a = Push(*store, {1.0f, 10.0f, 3});
  const auto b = Push(*store, {5.0f, 20.0f, 9});
  store->Apply(Step(1), {{a.get(), 3}, {b.get(), 1}});
  EXPECT_EQ(store->step(), 1);
  // Mean gradient 2, rate 0.5.
  EXPECT_FLOAT_EQ(Live(*store, 0, 77), TestValue("w", 77) - 1.0f);
  EXPECT_FLOAT_EQ(Live(*store, 1, 127), TestValue("b", 127) - 1.0f);
  EXPECT_FLOAT_EQ(Live(*store, 4, 0), 12.5f);
  EXPECT_EQ(Count(*store), 9);
  EXPECT_EQ(Live(*store, 3, 0), TestValue("fixed", 0));
}

TEST_F(ShardStoreTest, DecaysMatricesOnly) {
  const auto store = LoadedStore();
  const auto a = Push(*store, {0.0f, 0.0f, 0});
  store->Apply(Step(1, 0.5, 0.1), {{a.get(), 1}});
  EXPECT_FLOAT_EQ(Live(*store, 0, 7), TestValue("w", 7) * (1 - 0.05f));
  EXPECT_EQ(Live(*store, 1, 7), TestValue("b", 7));
}

TEST_F(ShardStoreTest, ClipScaleMultipliesTheGradient) {
  const auto store = LoadedStore();
  const auto a = Push(*store, {8.0f, 1.0f, 0});
  ShardStore::Update update = Step(1);
  update.clip_scale = 0.25;
  store->Apply(update, {{a.get(), 1}});
  EXPECT_FLOAT_EQ(Live(*store, 1, 3), TestValue("b", 3) - 1.0f);
  EXPECT_FLOAT_EQ(Live(*store, 4, 3), 1.0f);  // buffers are no gradients
}

TEST_F(ShardStoreTest, StepWithoutContributionsOnlyCounts) {
  const auto store = LoadedStore();
  store->Apply(Step(1), {});
  const auto empty = Push(*store, {8.0f, 1.0f, 0});
  store->Apply(Step(2), {{empty.get(), 0}});
  EXPECT_EQ(store->step(), 2);
  EXPECT_EQ(Live(*store, 0, 7), TestValue("w", 7));
}

TEST_F(ShardStoreTest, CutsAreImmutableAndFew) {
  const auto store = LoadedStore(/*held_cuts=*/2);
  store->Publish(0);
  const auto first = store->FindCut(0);
  ASSERT_NE(first, nullptr);
  const auto push = Push(*store, {2.0f, 1.0f, 0});
  for (int64_t step = 1; step <= 3; ++step) {
    store->Apply(Step(step), {{push.get(), 1}});
    store->Publish(step);
  }
  EXPECT_EQ(store->FindCut(0), nullptr);
  EXPECT_EQ(store->FindCut(1), nullptr);
  EXPECT_NE(store->FindCut(2), nullptr);
  EXPECT_EQ(store->newest_cut(), 3);
  // A reader that holds a cut keeps it, unchanged, whatever becomes of the memory of others.
  float value = 0;
  Read(*store, *first, 0, 0, 1, &value);
  EXPECT_EQ(value, TestValue("w", 0));
  // Until the group begins anew.
  store->DropCuts();
  EXPECT_TRUE(first->revoked());
  EXPECT_EQ(store->ReadElements(*first, 0, 0, 1, &value).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(store->newest_cut(), -1);
  EXPECT_EQ(MakeStore(0)->newest_cut(), -1);
}

TEST_F(ShardStoreTest, NewestCutIsAlwaysHeld) {
  const auto store = LoadedStore(/*held_cuts=*/0);
  store->Publish(0);
  EXPECT_NE(store->FindCut(0), nullptr);
}

TEST_F(ShardStoreTest, ReadersOfLiveWeightsKeepTheirStep) {
  const auto store = LoadedStore();
  EXPECT_EQ(store->Live(1, true), nullptr);
  EXPECT_EQ(store->Live(1, false), nullptr);
  PullSource source(Borrow(store), store->Live(0, true), Version(), {}, 4096);
  const auto shared = store->Live(0, false);
  EXPECT_EQ(shared, store->Live(0, true));  // one version for all readers of a step
  ASSERT_TRUE(source.Read(0).ok());
  const auto push = Push(*store, {2.0f, 1.0f, 0});
  store->Apply(Step(1), {{push.get(), 1}});
  const auto later = source.Read(1);
  ASSERT_TRUE(later.ok());
  float value = 0;
  std::memcpy(&value, later->data, sizeof(value));
  EXPECT_EQ(value, TestValue("w", 1024));
  EXPECT_EQ(Live(*store, 0, 1024), TestValue("w", 1024) - 1.0f);
  EXPECT_EQ(store->Live(0, true), nullptr);  // gone for whoever comes now
}

// The bound on memory that readers of live weights can hold.
TEST_F(ShardStoreTest, TooManyLiveReadsEndTheOldestOrWait) {
  SimulatedClock clock;
  clock_ = &clock;
  max_live_reads_ = 2;
  const auto store = LoadedStore();
  const auto push = Push(*store, {2.0f, 1.0f, 0});
  std::vector<std::shared_ptr<const Cut>> held;
  for (int64_t step = 0; step < 3; ++step) {
    held.push_back(store->Live(step, true));
    ASSERT_NE(held.back(), nullptr);
    store->Apply(Step(step + 1), {{push.get(), 1}});
  }
  EXPECT_TRUE(held[0]->revoked());
  EXPECT_FALSE(held[0]->block(0));
  EXPECT_FALSE(held[1]->revoked());
  EXPECT_EQ(store->memory().live_reads, 2);
  EXPECT_EQ(store->memory().revoked, 1);
  EXPECT_EQ(store->memory().held_bytes, 2 * store->memory().live_bytes);
  // Whom an older version serves shares the newest one that is read; others wait.
  EXPECT_EQ(store->Live(2, false), held[2]);
  EXPECT_EQ(store->Live(3, false), nullptr);
  clock.Advance(absl::Seconds(31));  // but not for ever
  const auto fresh = store->Live(3, false);
  ASSERT_NE(fresh, nullptr);
  EXPECT_EQ(fresh->step(), 3);
  EXPECT_TRUE(held[1]->revoked());
  EXPECT_FALSE(held[2]->revoked());
}

TEST_F(ShardStoreTest, ReadersOfOldCutsAreFew) {
  const auto store = LoadedStore(/*held_cuts=*/1);
  const auto push = Push(*store, {2.0f, 1.0f, 0});
  std::vector<std::shared_ptr<const Cut>> readers;
  for (int64_t step = 1; step <= 5; ++step) {
    store->Apply(Step(step), {{push.get(), 1}});
    store->Publish(step);
    readers.push_back(store->FindCut(step));
  }
  // One is held, two old ones are read to the end, the others have been taken away.
  EXPECT_TRUE(readers[0]->revoked());
  EXPECT_TRUE(readers[1]->revoked());
  for (int i = 2; i < 5; ++i) {
    float value = 0;
    Read(*store, *readers[i], 1, 0, 1, &value);
    EXPECT_FLOAT_EQ(value, TestValue("b", 0) - (i + 1)) << i;
  }
  EXPECT_EQ(store->memory().cuts, 1);
  EXPECT_EQ(store->memory().old_cuts, 2);
  EXPECT_EQ(store->memory().held_bytes, 2 * store->memory().live_bytes);
  // Cuts that nobody reads cost nothing once they are dropped, and no memory is ever added.
  readers.clear();
  const uint64_t allocated = store->memory().allocated_bytes;
  for (int64_t step = 6; step <= 20; ++step) {
    store->Apply(Step(step), {{push.get(), 1}});
    store->Publish(step);
  }
  EXPECT_EQ(store->memory().allocated_bytes, allocated);
  EXPECT_EQ(store->memory().held_bytes, 0u);
}

TEST_F(ShardStoreTest, PullSourceCoversEverythingInOrder) {
  const auto store = LoadedStore();
  store->Publish(0);
  PullSource source(Borrow(store), store->FindCut(0), Version(), {}, 1000);
  std::map<uint32_t, int64_t> next;
  for (int64_t i = 0; i < source.num_blocks(); ++i) {
    const auto block = source.Read(i);
    ASSERT_TRUE(block.ok());
    EXPECT_EQ(block->chunk.begin(), next[block->chunk.tensor()]);
    EXPECT_LE(block->bytes, 1000u);
    next[block->chunk.tensor()] += block->chunk.count();
  }
  EXPECT_EQ(next, (std::map<uint32_t, int64_t>{{0, 20480}, {1, 128}, {3, 3}, {4, 128}, {5, 1}}));
  PullSource some(Borrow(store), store->FindCut(0), Version(), {1, 5}, 1 << 20);
  EXPECT_EQ(some.num_blocks(), 2);
}

TEST_F(ShardStoreTest, ParametersTravelAsBfloat16OnRequest) {
  const auto store = LoadedStore();
  store->Publish(0);
  PullSource source(Borrow(store), store->FindCut(0), Version(), {}, 1 << 20, DT_BFLOAT16);
  for (int64_t i = 0; i < source.num_blocks(); ++i) {
    const auto block = source.Read(i);
    ASSERT_TRUE(block.ok());
    const uint32_t tensor = block->chunk.tensor();
    if (tensor > 1) {  // buffers and what is frozen
      EXPECT_EQ(block->chunk.dtype(), map_.tensors(tensor).dtype());
      continue;
    }
    EXPECT_EQ(block->chunk.dtype(), DT_BFLOAT16);
    ASSERT_EQ(block->bytes, 2u * block->chunk.count());
    const auto* const values = static_cast<const uint16_t*>(block->data);
    for (int64_t e = 0; e < block->chunk.count(); ++e) {
      ASSERT_EQ(values[e],
                ToBfloat16(TestValue(tensor == 0 ? "w" : "b", block->chunk.begin() + e)));
    }
  }
  EXPECT_EQ(store->memory().held_bytes, 0u);
}

class CheckpointOfStoreTest : public ShardStoreTest,
                              public testing::WithParamInterface<OptimizerConfig::Kind> {};

TEST_P(CheckpointOfStoreTest, ContinuesBitForBit) {
  optimizer_.set_kind(GetParam());
  map_ = BuildShardMap(TestTensors(), 1).value();
  const auto store = LoadedStore();
  const auto push = Push(*store, {0.3f, 1.5f, 6});
  const auto other = Push(*store, {-0.7f, 2.5f, 7});
  store->Apply(Step(1), {{push.get(), 1}, {other.get(), 2}});
  store->Publish(1);
  store->TakeSnapshot(1);
  const auto snapshot = store->snapshot(1);
  ASSERT_NE(snapshot, nullptr);
  // What comes later is no part of it.
  store->Apply(Step(2), {{other.get(), 1}});

  CheckpointManifest manifest;
  manifest.set_group("alpha");
  manifest.mutable_version()->set_generation(4);
  manifest.mutable_version()->set_step(1);
  manifest.set_shard_map_digest(77);
  CheckpointShardHeader identity;
  identity.set_group("alpha");
  *identity.mutable_version() = manifest.version();
  identity.set_shard_map_digest(77);
  const auto file =
      store->WriteSnapshot(*snapshot, directory_, "part", identity, FileSystem::Real());
  ASSERT_TRUE(file.ok()) << file.status();

  const auto again = MakeStore();
  const std::string path = JoinPath(directory_, "part");
  absl::Status status = again->LoadCheckpoint(path, manifest, FileSystem::Real());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(again->step(), 1);
  again->Apply(Step(2), {{other.get(), 1}});
  for (int64_t i : {0, 1, 5000, 20479}) EXPECT_EQ(Live(*again, 0, i), Live(*store, 0, i));
  EXPECT_EQ(Live(*again, 4, 9), Live(*store, 4, 9));
  EXPECT_EQ(Count(*again), 7);

  manifest.set_shard_map_digest(78);
  EXPECT_EQ(again->LoadCheckpoint(path, manifest, FileSystem::Real()).code(),
            absl::StatusCode::kDataLoss);
}

INSTANTIATE_TEST_SUITE_P(Kinds, CheckpointOfStoreTest,
                         testing::Values(OptimizerConfig::SGD, OptimizerConfig::MOMENTUM,
                                         OptimizerConfig::ADAM, OptimizerConfig::NESTEROV,
                                         OptimizerConfig::ADAGRAD, OptimizerConfig::ADAMW,
                                         OptimizerConfig::LARS));

TEST_F(ShardStoreTest, ShardsTogetherMakeTheWholeUpdate) {
  const auto whole = LoadedStore();
  const auto whole_push = Push(*whole, {0.3f, 1.0f, 1});
  whole->Apply(Step(1), {{whole_push.get(), 2}});
  const ShardMap map = BuildShardMap(TestTensors(), 3).value();
  int64_t elements = 0;
  for (int shard = 0; shard < 3; ++shard) {
    const auto part = MakeStore(2, &map, shard);
    ASSERT_TRUE(Load(part.get()).ok());
    const auto push = Push(*part, {0.3f, 1.0f, 1});
    part->Apply(Step(1), {{push.get(), 2}});
    for (const ShardPiece& piece : part->layout().pieces()) {
      elements += piece.piece.count();
      if (piece.dtype != DT_FLOAT) continue;
      for (int64_t i = piece.piece.begin(); i < piece.piece.begin() + piece.piece.count(); ++i) {
        ASSERT_EQ(Live(*part, piece.piece.tensor(), i), Live(*whole, piece.piece.tensor(), i));
      }
    }
  }
  EXPECT_EQ(elements, 20480 + 128 + 3 + 128 + 1);
}

// Readers of cuts and of live weights beside a writer: no cut is ever torn.
TEST_F(ShardStoreTest, ReadersBesideUpdates) {
  const auto store = LoadedStore();
  store->Publish(0);
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0}, reads{0};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&] {
      const ShardPiece& w = store->layout().pieces()[0];
      std::vector<float> values(w.piece.count());
      const auto check = [&](const Cut& cut) {
        if (!store->ReadElements(cut, 0, 0, w.piece.count(), values.data()).ok()) return;
        const float change = -0.5f * cut.step();
        for (int64_t i = 0; i < w.piece.count(); ++i) {
          if (std::abs(values[i] - TestValue("w", i) - change) > 1e-3) ++torn;
        }
        ++reads;
      };
      while (!stop.load()) {
        if (const auto cut = store->FindCut(store->newest_cut())) check(*cut);
        if (const auto live = store->Live(store->step(), true)) check(*live);
        if (const auto live = store->Live(store->step(), false)) check(*live);
      }
    });
  }
  const auto push = Push(*store, {1.0f, 1.0f, 0});
  for (int64_t step = 1; step <= 200; ++step) {
    store->Apply(Step(step), {{push.get(), 1}});
    store->Publish(step);
    // On a loaded machine the steps would be over before anybody has read.
    const absl::Time deadline = absl::Now() + absl::Seconds(10);
    while (reads.load() < step / 10 && absl::Now() < deadline) std::this_thread::yield();
  }
  stop.store(true);
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn.load(), 0);
  EXPECT_GE(reads.load(), 20);
}

}  // namespace
}  // namespace codistill
