#include "server/embedding/embedding_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/embedding/reference_table.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kLastKey = std::numeric_limits<uint64_t>::max();

EmbeddingTable::Options SmallOptions(int dim = 4) {
  EmbeddingTable::Options options;
  options.name = "ads";
  options.dim = dim;
  options.init = {TableSeed(1, "a", "ads"), 0.1f};
  options.optimizer.kind = RowOptimizer::Kind::kAdagrad;
  return options;
}

std::unique_ptr<EmbeddingTable> Make(const EmbeddingTable::Options& options) {
  auto table = EmbeddingTable::Create(options);
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

std::vector<float> Gather(EmbeddingTable* table, const std::vector<uint64_t>& keys) {
  std::vector<float> rows(keys.size() * table->dim());
  EXPECT_TRUE(table->Gather(keys, absl::MakeSpan(rows)).ok());
  return rows;
}

std::vector<float> Default(const EmbeddingTable& table, uint64_t key) {
  std::vector<float> row(table.dim());
  DefaultRow(table.options().init, key, absl::MakeSpan(row));
  return row;
}

// Unique keys below `keys`, low ones more often.
struct Batch {
  std::vector<uint64_t> keys;
  std::vector<float> gradients;
};
Batch RandomBatch(RandomStream* random, int max_size, uint64_t keys, int dim) {
  Batch batch;
  std::set<uint64_t> chosen;
  const size_t size = random->Below(max_size);
  for (size_t i = 0; i < size; ++i) {
    const double u = random->Uniform();
    const uint64_t k = static_cast<uint64_t>(u * u * u * static_cast<double>(keys));
    // Every value is a key, the extreme ones too.
    const uint64_t key = k == 1 ? kLastKey : k % 2 == 0 ? k : MixBits(k);
    if (chosen.insert(key).second) batch.keys.push_back(key);
  }
  batch.gradients.resize(batch.keys.size() * dim);
  for (float& g : batch.gradients) g = static_cast<float>(random->Normal());
  return batch;
}

using Contents = std::map<uint64_t, ReferenceTable::Item>;

Contents ContentsOf(EmbeddingTable::Snapshot* snapshot, int row_floats) {
  Contents contents;
  EmbeddingTable::Rows rows;
  while (snapshot->Next(&rows)) {
    for (size_t i = 0; i < rows.keys.size(); ++i) {
      const float* const data = rows.data.data() + i * row_floats;
      const bool added =
          contents
              .emplace(rows.keys[i],
                       ReferenceTable::Item{rows.touched[i], 0, {data, data + row_floats}})
              .second;
      EXPECT_TRUE(added) << "row of key " << rows.keys[i] << " twice";
    }
    for (size_t i = 0; i < rows.waiting.size(); ++i) {
      const bool added =
          contents
              .emplace(rows.waiting[i],
                       ReferenceTable::Item{rows.waiting_touched[i], rows.waiting_count[i], {}})
              .second;
      EXPECT_TRUE(added) << "waiting key " << rows.waiting[i] << " twice";
    }
  }
  return contents;
}

void ExpectSame(const Contents& got, const Contents& want) {
  ASSERT_EQ(got.size(), want.size());
  for (const auto& item : want) {
    const auto it = got.find(item.first);
    ASSERT_NE(it, got.end()) << "key " << item.first;
    EXPECT_EQ(it->second.touched, item.second.touched) << "key " << item.first;
    EXPECT_EQ(it->second.count, item.second.count) << "key " << item.first;
    if (item.second.count == 0) {
      EXPECT_EQ(it->second.data, item.second.data) << "key " << item.first;
    }
  }
}

TEST(EmbeddingTable, ServesDefaultsUntilARowIsPushed) {
  auto table = Make(SmallOptions());
  EXPECT_EQ(Gather(table.get(), {0}), Default(*table, 0));
  EXPECT_EQ(table->stats().rows, 0);
  const std::vector<float> gradient = {1, 0, -2, 0.5f};
  const auto counts = table->Apply({1, 0.1}, {0}, gradient);
  EXPECT_EQ(counts.applied, 1);
  EXPECT_EQ(counts.created, 1);
  std::vector<float> want = Default(*table, 0);
  for (int i = 0; i < 4; ++i) {
    // Adagrad's first step is the learning rate, whatever the gradient's size.
    want[i] -= gradient[i] == 0 ? 0 : std::copysign(0.1f, gradient[i]);
  }
  const std::vector<float> got = Gather(table.get(), {0});
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(got[i], want[i], 1e-6);
  EXPECT_EQ(Gather(table.get(), {kLastKey}), Default(*table, kLastKey));
  EXPECT_EQ(table->step(), 1);
}

TEST(EmbeddingTable, NamesBadOptions) {
  const auto error = [](auto change) {
    EmbeddingTable::Options options = SmallOptions();
    change(&options);
    return std::string(EmbeddingTable::Create(options).status().message());
  };
  EXPECT_THAT(error([](auto* o) { o->dim = 0; }), HasSubstr("embedding table ads: dim: 0"));
  EXPECT_THAT(error([](auto* o) { o->min_count = 0; }), HasSubstr("min_count"));
  EXPECT_THAT(error([](auto* o) { o->max_bytes = 5; }), HasSubstr("max_bytes"));
  EXPECT_THAT(error([](auto* o) { o->min_norm = -1; }), HasSubstr("min_norm"));
  EXPECT_THAT(error([](auto* o) { o->optimizer.beta1 = 1; }), HasSubstr("optimizer.beta1: 1"));
  EXPECT_THAT(error([](auto* o) { o->init.scale = NAN; }), HasSubstr("init.scale"));
}

TEST(EmbeddingTable, ReadsOfAStepThatIsGoneAreRefused) {
  auto table = Make(SmallOptions());
  table->Apply({1, 0.1}, {}, {});
  std::vector<float> row(4);
  EXPECT_TRUE(table->Gather({5}, absl::MakeSpan(row), 1).ok());
  table->Apply({2, 0.1}, {}, {});
  const absl::Status status = table->Gather({5}, absl::MakeSpan(row), 1);
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("step 2"));
}

// Everything at once against the plain table: after each update all keys are compared, and once in
// a while all that is stored. Reads, snapshots, sweeps and reloads in between must change nothing.
struct Rules {
  const char* name;
  int64_t min_count, max_age, min_norm_age;
  float min_norm;
  uint64_t max_bytes;
  RowOptimizer::Kind kind;
  int dim;
};
class Randomized : public ::testing::TestWithParam<Rules> {};

TEST_P(Randomized, AgreesWithTheReference) {
  const Rules& rules = GetParam();
  EmbeddingTable::Options options = SmallOptions(rules.dim);
  options.min_count = rules.min_count;
  options.max_age_steps = rules.max_age;
  options.min_norm = rules.min_norm;
  options.min_norm_age_steps = rules.min_norm_age;
  options.max_bytes = rules.max_bytes;
  options.optimizer.kind = rules.kind;
  options.optimizer.l1 = rules.kind == RowOptimizer::Kind::kFtrl ? 0.5f : 0;
  auto table = Make(options);
  ReferenceTable reference(options);
  RandomStream random(17);
  constexpr uint64_t kKeys = 20000;
  EmbeddingTable::Counts total;
  for (int64_t step = 1; step <= 150; ++step) {
    const Batch batch = RandomBatch(&random, step % 10 == 0 ? 6000 : 700, kKeys, rules.dim);
    // A snapshot is read while the table goes on, or not at all.
    std::unique_ptr<EmbeddingTable::Snapshot> snapshot;
    Contents then;
    if (step % 15 == 0) {
      snapshot = *table->TakeSnapshot();
      then = reference.items();
    }
    const auto counts = table->Apply({step, 0.05}, batch.keys, batch.gradients);
    total.created += counts.created;
    total.not_admitted += counts.not_admitted;
    total.refused += counts.refused;
    reference.Apply({step, 0.05}, batch.keys, batch.gradients);
    if (step % 40 == 0) {
      table->Evict(30, 0.15f);
      reference.Evict(30, 0.15f);
    }
    Batch asked = RandomBatch(&random, 2000, kKeys, 1);
    const std::vector<float> rows = Gather(table.get(), asked.keys);
    std::vector<uint8_t> present(asked.keys.size());
    std::vector<float> again(rows.size());
    table->Read(asked.keys, absl::MakeSpan(again), absl::MakeSpan(present));
    EXPECT_EQ(rows, again);
    for (size_t i = 0; i < asked.keys.size(); ++i) {
      const auto at = rows.begin() + i * rules.dim;
      ASSERT_EQ(std::vector<float>(at, at + rules.dim), reference.Row(asked.keys[i]))
          << "key " << asked.keys[i] << " after step " << step;
      ASSERT_EQ(present[i] != 0, reference.Has(asked.keys[i])) << asked.keys[i];
    }
    if (snapshot != nullptr) {
      EXPECT_EQ(snapshot->step(), step - 1);
      ExpectSame(ContentsOf(snapshot.get(), table->optimizer().row_floats()), then);
      snapshot.reset();
    }
    if (step % 50 == 0) {
      // What is saved and loaded goes on as if nothing had happened, though it lies elsewhere.
      auto other = Make(options);
      other->Clear(step);
      auto saved = *table->TakeSnapshot();
      EmbeddingTable::Rows part;
      while (saved->Next(&part)) ASSERT_TRUE(other->Load(part).ok());
      saved.reset();
      table = std::move(other);
    }
    if (rules.max_bytes > 0) {
      const auto stats = table->stats();
      EXPECT_LE(stats.rows * (table->optimizer().row_floats() * 4 + 24) + stats.waiting * 24,
                rules.max_bytes);
    }
  }
  EXPECT_EQ(total.created, reference.created);
  EXPECT_EQ(total.not_admitted, reference.not_admitted);
  EXPECT_EQ(total.refused, reference.refused);
  EXPECT_EQ(total.not_admitted > 0, rules.min_count > 1);
  EXPECT_EQ(reference.forgotten > 0, rules.max_bytes > 0);
  auto snapshot = *table->TakeSnapshot();
  ExpectSame(ContentsOf(snapshot.get(), table->optimizer().row_floats()), reference.items());
}

INSTANTIATE_TEST_SUITE_P(
    EmbeddingTable, Randomized,
    ::testing::Values(Rules{"Plain", 1, 0, 0, 0, 0, RowOptimizer::Kind::kAdagrad, 16},
                      Rules{"Admission", 3, 0, 0, 0, 0, RowOptimizer::Kind::kSgd, 1},
                      Rules{"Age", 1, 9, 0, 0, 0, RowOptimizer::Kind::kAdam, 7},
                      Rules{"Norm", 1, 0, 4, 0.2f, 0, RowOptimizer::Kind::kAdagrad, 4},
                      Rules{"Ftrl", 1, 30, 4, 0.2f, 0, RowOptimizer::Kind::kFtrl, 5},
                      Rules{"Bound", 1, 0, 0, 0, 1 << 20, RowOptimizer::Kind::kAdagrad, 16},
                      Rules{"All", 2, 25, 6, 0.15f, 1 << 20, RowOptimizer::Kind::kMomentum, 24}),
    [](const auto& info) { return info.param.name; });

TEST(EmbeddingTable, GrowsWithoutLosingAKey) {
  auto table = Make(SmallOptions(1));
  const uint64_t n = 300000;
  std::vector<uint64_t> keys;
  for (uint64_t i = 0; i < n; ++i) keys.push_back(MixBits(i));
  int64_t step = 0;
  for (size_t at = 0; at < n; at += 5000) {
    const auto part = absl::MakeConstSpan(keys).subspan(at, 5000);
    const std::vector<float> gradients(part.size(), -1.0f);
    ASSERT_EQ(table->Apply({++step, 1}, part, gradients).created,
              static_cast<int64_t>(part.size()));
  }
  EXPECT_EQ(table->stats().rows, static_cast<int64_t>(n));
  const std::vector<float> rows = Gather(table.get(), keys);
  for (uint64_t i = 0; i < n; ++i) {
    ASSERT_NEAR(rows[i], Default(*table, keys[i])[0] + 1, 1e-6) << i;
  }
}

TEST(EmbeddingTable, RepeatedKeysAreUpdatedInTurn) {
  auto options = SmallOptions(1);
  options.optimizer.kind = RowOptimizer::Kind::kSgd;
  auto table = Make(options);
  const std::vector<uint64_t> keys = {9, 9, 9};
  table->Apply({1, 1}, keys, {1, 2, 4});
  EXPECT_NEAR(Gather(table.get(), {9})[0], Default(*table, 9)[0] - 7, 1e-6);
}

TEST(EmbeddingTable, ReadersMakeRowsWhereAsked) {
  auto options = SmallOptions();
  options.insert_on_gather = true;
  options.max_age_steps = 3;
  auto table = Make(options);
  EXPECT_EQ(Gather(table.get(), {4, 5}).size(), 8u);
  EXPECT_EQ(table->stats().rows, 2);
  table->Apply({1, 0.1}, {4}, {1, 1, 1, 1});
  const std::vector<float> trained = Gather(table.get(), {4});
  // Reading keeps it young.
  for (int64_t step = 2; step < 12; ++step) {
    table->Apply({step, 0.1}, {}, {});
    EXPECT_EQ(Gather(table.get(), {4}), trained) << step;
  }
  for (int64_t step = 12; step < 17; ++step) table->Apply({step, 0.1}, {}, {});
  EXPECT_EQ(Gather(table.get(), {4}), Default(*table, 4));
}

TEST(EmbeddingTable, RemembersWhatChanged) {
  auto options = SmallOptions(2);
  options.max_log_keys = 1000;
  auto table = Make(options);
  EXPECT_TRUE(table->ChangesSince(0).everything);
  table->Mark();
  table->Apply({1, 0.1}, {1, 2}, {1, 1, 1, 1});
  table->Apply({2, 0.1}, {2, 3}, {1, 1, 1, 1});
  table->Mark();
  table->Apply({3, 0.1}, {3, 4}, {1, 1, 1, 1});
  EXPECT_EQ(table->ChangesSince(0).keys, (std::vector<uint64_t>{1, 2, 3, 4}));
  EXPECT_EQ(table->ChangesSince(2).keys, (std::vector<uint64_t>{3, 4}));
  table->Evict(1, 0);  // not touched in step 3
  EXPECT_EQ(table->ChangesSince(2).keys, (std::vector<uint64_t>{1, 2, 3, 4}));
  std::vector<uint8_t> present(4);
  std::vector<float> rows(8);
  table->Read({1, 2, 3, 4}, absl::MakeSpan(rows), absl::MakeSpan(present));
  EXPECT_EQ(present, (std::vector<uint8_t>{0, 0, 1, 1}));
  // More than is remembered.
  std::vector<uint64_t> many(1500);
  for (size_t i = 0; i < many.size(); ++i) many[i] = 100 + i;
  table->Apply({4, 0.1}, many, std::vector<float>(3000, 1.0f));
  EXPECT_TRUE(table->ChangesSince(0).everything);
  EXPECT_TRUE(table->ChangesSince(2).everything);
  table->Mark();
  table->Apply({5, 0.1}, {7}, {1, 1});
  EXPECT_EQ(table->ChangesSince(4).keys, (std::vector<uint64_t>{7}));
}

TEST(EmbeddingTable, SnapshotsSinceAStepHaveWhatWasTouchedAfterIt) {
  auto table = Make(SmallOptions(1));
  table->Apply({1, 0.1}, {1, 2}, {1, 1});
  table->Apply({2, 0.1}, {2, 3}, {1, 1});
  auto snapshot = *table->TakeSnapshot(1);
  table->Apply({3, 0.1}, {1, 2, 3, 4}, {1, 1, 1, 1});
  const Contents got = ContentsOf(snapshot.get(), 2);
  ASSERT_EQ(got.size(), 2u);
  EXPECT_EQ(got.at(2).touched, 2u);
  EXPECT_EQ(got.at(3).touched, 2u);
}

TEST(EmbeddingTable, ClearEndsSnapshots) {
  auto table = Make(SmallOptions(1));
  table->Apply({1, 0.1}, {1, 2}, {1, 1});
  auto snapshot = *table->TakeSnapshot();
  table->Clear(0);
  EmbeddingTable::Rows rows;
  EXPECT_FALSE(snapshot->Next(&rows));
  EXPECT_EQ(table->stats().rows, 0);
}

TEST(EmbeddingTable, RefusesRowsThatDoNotFit) {
  auto table = Make(SmallOptions(2));
  EmbeddingTable::Rows rows;
  rows.keys = {1};
  rows.touched = {0};
  rows.data = {1, 2, 3};  // Adagrad has four floats
  const absl::Status status = table->Load(rows);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("4 floats a row"));
}

// One writer, two readers, one of snapshots: no row is ever torn, and none goes back.
TEST(EmbeddingTable, ReadersRunBesideTheWriter) {
  auto options = SmallOptions(16);
  options.optimizer.kind = RowOptimizer::Kind::kSgd;
  options.init.scale = 0;
  auto table = Make(options);
  std::vector<uint64_t> keys;
  for (uint64_t i = 0; i < 6000; ++i) keys.push_back(MixBits(i));
  std::atomic<bool> stop{false};
  const auto read = [&] {
    std::vector<float> rows(keys.size() * 16), seen(keys.size(), 0);
    while (!stop.load()) {
      ASSERT_TRUE(table->Gather(keys, absl::MakeSpan(rows)).ok());
      for (size_t i = 0; i < keys.size(); ++i) {
        for (int d = 1; d < 16; ++d) ASSERT_EQ(rows[i * 16 + d], rows[i * 16]) << "torn";
        ASSERT_GE(rows[i * 16], seen[i]) << "went back";
        seen[i] = rows[i * 16];
      }
    }
  };
  std::thread first(read), second(read);
  const std::vector<float> gradients(keys.size() * 16, -1.0f);
  for (int64_t step = 1; step <= 60; ++step) {
    // A growing number of keys, so that the index moves meanwhile.
    const size_t n = keys.size() * step / 60;
    table->Apply({step, 1}, absl::MakeConstSpan(keys).first(n),
                 absl::MakeConstSpan(gradients).first(n * 16));
  }
  stop.store(true);
  first.join();
  second.join();
  EXPECT_EQ(Gather(table.get(), {keys[0]})[0], 60);
}

}  // namespace
}  // namespace codistill
