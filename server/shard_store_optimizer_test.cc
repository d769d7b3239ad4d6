#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/base/file.h"
#include "common/base/file_system.h"
#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/shard_store.h"
#include "server/test_model.h"

// How a store takes steps: on several threads, by parameter groups, with norms.
namespace codistill {
namespace {

using ::testing::HasSubstr;

// Several blocks, tensors that begin and end within blocks, and a frozen one.
class StoreOptimizerTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "store_optimizer",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    Add("body.weight", {700, 1000});
    Add("body.bias", {1003});
    Add("head.weight", {300, 1100});
    Add("head.bias", {7});
    map_ = BuildShardMap(tensors_, 1).value();
    const std::string bytes = SafetensorsBytes(
        tensors_, [](int, int64_t i) { return static_cast<float>(Mix(1, i) % 20001) / 1e4f - 1; });
    ASSERT_TRUE(WriteFileAtomically(JoinPath(directory_, "w.safetensors"), bytes).ok());
  }

  void Add(const std::string& name, std::vector<int64_t> shape) {
    TensorSpec* spec = tensors_.add_tensors();
    spec->set_name(name);
    spec->set_dtype(DT_FLOAT);
    spec->set_role(TensorSpec::PARAMETER);
    for (const int64_t dimension : shape) spec->add_shape(dimension);
  }
  static int64_t Elements(const TensorSpec& spec) {
    int64_t elements = 1;
    for (const int64_t dimension : spec.shape()) elements *= dimension;
    return elements;
  }
  static std::vector<float> Random(int64_t n, uint64_t seed) {
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i) {
      values[i] = static_cast<float>(Mix(seed, i) % 20001) / 10000.0f - 1.0f;
    }
    return values;
  }

  absl::StatusOr<std::unique_ptr<ShardStore>> Make(int threads = 1, int shard = 0) {
    ShardStore::Options options;
    options.map = map_;
    options.shard = shard;
    options.optimizer = optimizer_;
    options.threads = threads;
    auto store = ShardStore::Create(options);
    if (!store.ok()) return store;
    const absl::Status loaded =
        (*store)->LoadInitial(JoinPath(directory_, "w.safetensors"), "", FileSystem::Real());
    if (!loaded.ok()) return loaded;
    return store;
  }

  // A push of gradients that depend on (seed, tensor) alone, however the tensors are cut.
  std::shared_ptr<StagedPush> Push(const ShardStore& store, uint64_t seed) {
    auto push = store.NewPush(PushBegin());
    for (const ShardPiece& piece : store.layout().pieces()) {
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_begin(piece.piece.begin());
      chunk.set_count(piece.piece.count());
      chunk.set_dtype(DT_FLOAT);
      chunk.set_content(TensorChunk::GRADIENT);
      const std::vector<float> gradient = Gradient(piece.piece.tensor(), seed);
      void* const place = push->Place(chunk, piece.bytes).value();
      std::memcpy(place, gradient.data() + piece.piece.begin(), piece.bytes);
    }
    return push;
  }
  std::vector<float> Gradient(uint32_t tensor, uint64_t seed) {
    return Random(Elements(tensors_.tensors(static_cast<int>(tensor))), Mix(seed, tensor));
  }

  std::vector<float> Read(ShardStore* store, int tensor) {
    std::vector<float> values(Elements(tensors_.tensors(tensor)));
    const auto live = store->Live(store->step(), true);
    const int piece = store->layout().Find(tensor, 0, 1).value();
    EXPECT_TRUE(store->ReadElements(*live, piece, 0, values.size(), values.data()).ok());
    return values;
  }

  std::string directory_;
  TensorList tensors_;
  ShardMap map_;
  OptimizerConfig optimizer_;
};

TEST_F(StoreOptimizerTest, AnyNumberOfThreadsMakesTheSameBits) {
  optimizer_.set_kind(OptimizerConfig::ADAM);
  std::vector<std::vector<float>> expected;
  std::vector<TensorNorm> expected_norms;
  for (const int threads : {1, 2, 3, 8}) {
    const auto store = Make(threads).value();
    const auto a = Push(*store, 11), b = Push(*store, 12);
    for (int step = 1; step <= 3; ++step) {
      if (step == 2) store->Publish(1);  // the next step goes to other blocks
      store->Apply({step, 0.01, 0.1, 0.5, {}}, {{a.get(), 3}, {b.get(), 2}});
    }
    const std::vector<TensorNorm> norms = store->Norms({{a.get(), 3}, {b.get(), 2}}, true);
    for (int tensor = 0; tensor < tensors_.tensors_size(); ++tensor) {
      const std::vector<float> values = Read(store.get(), tensor);
      if (threads == 1) {
        expected.push_back(values);
      } else {
        EXPECT_EQ(values, expected[tensor]) << threads;
      }
    }
    if (threads == 1) expected_norms = norms;
    ASSERT_EQ(norms.size(), expected_norms.size());
    for (size_t i = 0; i < norms.size(); ++i) {
      EXPECT_EQ(norms[i].gradient_squared(), expected_norms[i].gradient_squared());
      EXPECT_EQ(norms[i].weight_squared(), expected_norms[i].weight_squared());
    }
  }
}

TEST_F(StoreOptimizerTest, NormsAreOfTheAverageAndTheValues) {
  const auto store = Make().value();
  const auto a = Push(*store, 1), b = Push(*store, 2);
  const std::vector<TensorNorm> norms = store->Norms({{a.get(), 3}, {b.get(), 1}}, true);
  ASSERT_EQ(norms.size(), 4u);
  for (int tensor = 0; tensor < 4; ++tensor) {
    const std::vector<float> ga = Gradient(tensor, 1), gb = Gradient(tensor, 2);
    const std::vector<float> values = Read(store.get(), tensor);
    double gradient = 0, weight = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      const double average = 0.75 * ga[i] + 0.25 * gb[i];
      gradient += average * average;
      weight += static_cast<double>(values[i]) * values[i];
    }
    EXPECT_EQ(norms[tensor].tensor(), static_cast<uint32_t>(tensor));
    EXPECT_NEAR(norms[tensor].gradient_squared(), gradient, 1e-6 * gradient);
    EXPECT_NEAR(norms[tensor].weight_squared(), weight, 1e-9 * weight);
  }
  EXPECT_EQ(store->Norms({}, true)[0].gradient_squared(), 0);
}

TEST_F(StoreOptimizerTest, ParameterGroupsHold) {
  ParameterGroup* group = optimizer_.add_parameter_groups();
  group->set_pattern("head.bias");
  group->set_learning_rate_multiplier(10);
  group = optimizer_.add_parameter_groups();
  group->set_pattern("body.weight");
  group->set_frozen(true);
  group = optimizer_.add_parameter_groups();
  group->set_pattern("body.*");
  group->set_weight_decay_multiplier(0.5f);
  optimizer_.set_kind(OptimizerConfig::MOMENTUM);
  const auto store = Make().value();
  std::vector<std::vector<float>> before;
  for (int tensor = 0; tensor < 4; ++tensor) before.push_back(Read(store.get(), tensor));
  const auto push = Push(*store, 5);
  EXPECT_EQ(store->Norms({{push.get(), 1}}, false).size(), 3u);  // none of what is frozen
  const auto reader = store->Live(0, true);                      // so the step is out of place
  store->Apply({1, 0.1, 0.2, 1, {}}, {{push.get(), 1}});
  EXPECT_EQ(Read(store.get(), 0), before[0]);
  const double rates[] = {0, 0.1, 0.1, 1.0}, decays[] = {0, 0.1, 0.2, 0};
  for (int tensor = 1; tensor < 4; ++tensor) {
    const std::vector<float> gradient = Gradient(tensor, 5), after = Read(store.get(), tensor);
    for (size_t i = 0; i < after.size(); ++i) {
      const double w = before[tensor][i];
      ASSERT_NEAR(after[i], w - rates[tensor] * (gradient[i] + decays[tensor] * w), 1e-6)
          << tensor << " " << i;
    }
  }
}

TEST_F(StoreOptimizerTest, AFrozenParameterNeedsNoGradient) {
  map_.add_frozen(0);
  ParameterGroup* group = optimizer_.add_parameter_groups();
  group->set_pattern("body.weight");
  group->set_frozen(true);
  const auto store = Make().value();
  auto push = store->NewPush(PushBegin());
  EXPECT_THAT(std::string(push->CheckComplete().message()), HasSubstr("tensor body.bias has not"));
}

TEST_F(StoreOptimizerTest, UnknownPatternsAreRefusedByName) {
  optimizer_.add_parameter_groups()->set_pattern("haed.*");
  EXPECT_THAT(std::string(Make().status().message()), HasSubstr("(haed.*)"));
}

TEST_F(StoreOptimizerTest, LarsTakesTheRatioOfWholeTensors) {
  optimizer_.set_kind(OptimizerConfig::LARS);
  optimizer_.set_trust_coefficient(0.01f);
  const std::vector<std::vector<float>> before = [&] {
    const auto store = Make().value();
    std::vector<std::vector<float>> values;
    for (int tensor = 0; tensor < 4; ++tensor) values.push_back(Read(store.get(), tensor));
    return values;
  }();
  // Two shards hold parts of the large tensors; the norms are added up over both.
  map_ = BuildShardMap(tensors_, 2).value();
  std::vector<std::unique_ptr<ShardStore>> stores;
  std::vector<std::shared_ptr<StagedPush>> pushes;
  std::map<uint32_t, TensorNorm> sums;
  for (int shard = 0; shard < 2; ++shard) {
    stores.push_back(Make(1, shard).value());
    pushes.push_back(Push(*stores[shard], 3));
    for (const TensorNorm& norm : stores[shard]->Norms({{pushes[shard].get(), 1}}, true)) {
      TensorNorm& sum = sums[norm.tensor()];
      sum.set_tensor(norm.tensor());
      sum.set_gradient_squared(sum.gradient_squared() + norm.gradient_squared());
      sum.set_weight_squared(sum.weight_squared() + norm.weight_squared());
    }
  }
  ShardStore::Update update = {1, 2.0, 0.1, 0.5, {}};
  for (const auto& sum : sums) update.norms.push_back(sum.second);
  for (int shard = 0; shard < 2; ++shard) stores[shard]->Apply(update, {{pushes[shard].get(), 1}});

  for (int tensor = 0; tensor < 4; ++tensor) {
    const std::vector<float> gradient = Gradient(tensor, 3);
    const double decay = tensors_.tensors(tensor).shape_size() >= 2 ? 0.1 : 0.0;
    double g2 = 0, w2 = 0;
    for (size_t i = 0; i < gradient.size(); ++i) {
      g2 += 0.25 * gradient[i] * gradient[i];
      w2 += static_cast<double>(before[tensor][i]) * before[tensor][i];
    }
    const double ratio = 0.01 * std::sqrt(w2) / (std::sqrt(g2) + decay * std::sqrt(w2));
    for (const auto& store : stores) {
      const auto live = store->Live(1, true);
      for (const ShardPiece& piece : store->layout().pieces()) {
        if (piece.piece.tensor() != static_cast<uint32_t>(tensor)) continue;
        std::vector<float> after(piece.piece.count());
        const int index = store->layout().Find(tensor, piece.piece.begin(), 1).value();
        ASSERT_TRUE(
            store
                ->ReadElements(*live, index, piece.piece.begin(), piece.piece.count(), after.data())
                .ok());
        for (size_t i = 0; i < after.size(); ++i) {
          const double w = before[tensor][piece.piece.begin() + i];
          const double g = 0.5 * gradient[piece.piece.begin() + i] + decay * w;
          ASSERT_NEAR(after[i], w - 2.0 * ratio * g, 1e-6) << tensor << " " << i;
        }
      }
    }
  }
}

TEST_F(StoreOptimizerTest, AdagradStartsFromItsInitialAccumulator) {
  optimizer_.set_kind(OptimizerConfig::ADAGRAD);
  optimizer_.set_initial_accumulator(0.5f);
  const auto store = Make().value();
  const std::vector<float> before = Read(store.get(), 1);
  const auto push = Push(*store, 5);
  store->Apply({1, 0.1, 0, 1, {}}, {{push.get(), 1}});
  const std::vector<float> gradient = Gradient(1, 5), after = Read(store.get(), 1);
  for (size_t i = 0; i < after.size(); ++i) {
    const double g = gradient[i];
    ASSERT_NEAR(after[i], before[i] - 0.1 * g / std::sqrt(0.5 + g * g), 1e-6);
  }
}

// Every push is finite and so is their average, though their plain sum is beyond fp32.
TEST_F(StoreOptimizerTest, AveragesOfTheLargestFloatsAreFinite) {
  const auto store = Make().value();
  std::vector<std::shared_ptr<StagedPush>> pushes;
  std::vector<ShardStore::Contribution> contributions;
  for (int i = 0; i < 3; ++i) {
    pushes.push_back(Push(*store, i));
    const ShardPiece& piece = store->layout().pieces()[0];
    float* const gradient =
        reinterpret_cast<float*>(const_cast<uint8_t*>(pushes[i]->data()) + piece.offset);
    std::fill(gradient, gradient + piece.piece.count(), 3.0e38f);
    contributions.push_back({pushes[i].get(), 7});
  }
  const std::vector<TensorNorm> norms = store->Norms(contributions, false);
  EXPECT_TRUE(std::isfinite(norms[0].gradient_squared()));
  store->Apply({1, 1e-38, 0, 1, {}}, contributions);
  for (const float value : Read(store.get(), 0)) ASSERT_TRUE(std::isfinite(value));
}

}  // namespace
}  // namespace codistill
