// Embedding tables over real daemons, on a small file in the layout of the Criteo data.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/client/row_follower.h"
#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int kNumeric = 13;
constexpr int kCategorical = 26;
constexpr int64_t kSteps = 240;

// Records whose labels depend on the values of the first columns: frequent values that mean
// something, and rare ones that come once or twice.
std::string Records(uint64_t seed, int count) {
  RandomStream random(seed);
  std::string text;
  for (int i = 0; i < count; ++i) {
    double logit = -0.3;
    std::string rest;
    for (int c = 0; c < kNumeric; ++c) {
      const double x = random.Normal();
      if (c == 0) logit += 0.5 * x;
      // Counts may be missing.
      if (random.Below(10) == 0) {
        rest += "\t";
      } else {
        absl::StrAppend(&rest, "\t", static_cast<int64_t>(10 * std::fabs(x)));
      }
    }
    for (int c = 0; c < kCategorical; ++c) {
      const bool rare = random.Below(8) == 0;
      const uint64_t value = rare ? 1000 + random.Below(2000) : random.Below(12);
      if (c < 6 && !rare) logit += 2 * UniformDouble(Mix(value, c)) - 1;
      absl::StrAppend(&rest, "\t", absl::Hex(Mix(value, c, 7) >> 32, absl::kZeroPad8));
    }
    const bool click = random.Uniform() < 1 / (1 + std::exp(-2 * logit));
    absl::StrAppend(&text, click ? "1" : "0", rest, "\n");
  }
  return text;
}

std::string DataDirectory() {
  static const std::string* const directory = [] {
    auto* made = new std::string(NewDirectory("criteo-data"));
    EXPECT_TRUE(WriteFileAtomically(JoinPath(*made, "criteo-train.tsv"), Records(1, 6000)).ok());
    EXPECT_TRUE(WriteFileAtomically(JoinPath(*made, "criteo-test.tsv"), Records(2, 1500)).ok());
    return made;
  }();
  return *directory;
}

// The job of deploy/jobs, smaller.
JobConfig CriteoJob(int groups) {
  auto loaded = LoadJob(RunfilesPath("deploy/jobs/criteo.textproto"));
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  JobConfig job = loaded.ok() ? *loaded : JobConfig();
  while (job.groups_size() > groups) job.mutable_groups()->RemoveLast();
  for (GroupConfig& group : *job.mutable_groups()) group.set_num_workers(groups == 1 ? 2 : 1);
  for (ModelExport::Option& option : *job.mutable_model()->mutable_export_()->mutable_options()) {
    if (option.key() == "hidden") option.set_value("32");
    if (option.key() == "embedding") option.set_value("4");
  }
  job.mutable_model()->mutable_embedding_tables(0)->set_dim(4);
  job.mutable_model()->mutable_embedding_tables(0)->set_evict_age_steps(40);
  job.mutable_training()->set_batch_size(64);
  job.mutable_training()->set_publish_every_steps(20);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.003f);
  job.mutable_codistillation()->set_burn_in_steps(60);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::WAIT);
  job.mutable_evaluation()->set_every_steps(120);
  job.mutable_evaluation()->set_max_examples(500);
  job.mutable_checkpoint()->set_every_steps(25);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

// A follower's rows.
class Rows : public RowFollower::Sink {
 public:
  absl::Status Begin(int, bool whole) override {
    if (whole) ++wholes;
    return absl::OkStatus();
  }
  void Put(int, absl::Span<const uint64_t> keys, absl::Span<const float> rows) override {
    const size_t dim = rows.size() / keys.size();
    for (size_t i = 0; i < keys.size(); ++i) {
      by_key[keys[i]].assign(rows.begin() + i * dim, rows.begin() + (i + 1) * dim);
    }
  }
  void Erase(int, absl::Span<const uint64_t> keys) override {
    for (const uint64_t key : keys) erased += static_cast<int64_t>(by_key.erase(key));
  }

  std::map<uint64_t, std::vector<float>> by_key;
  int wholes = 0;
  int64_t erased = 0;
};

absl::StatusOr<std::unique_ptr<RowFollower>> Follow(JobHarness* harness) {
  const auto state = harness->State(0);
  if (!state.ok()) return state.status();
  RowFollower::Options options;
  options.group = harness->Ref(0);
  options.shard_map_digest = state->shard_map_digest();
  options.shard_addresses.assign(state->shard_addresses().begin(), state->shard_addresses().end());
  options.dims = {harness->job().model().embedding_tables(0).dim()};
  return RowFollower::Create(std::move(options));
}

// Dense weights and rows at the end of a run.
struct End {
  Weights weights;
  std::map<uint64_t, std::vector<float>> rows;
};

absl::StatusOr<End> Finish(JobHarness* harness) {
  absl::Status status = harness->WaitUntilDone();
  if (!status.ok()) return status;
  auto weights = harness->NewestCut(0);
  if (!weights.ok()) return weights.status();
  auto follower = Follow(harness);
  if (!follower.ok()) return follower.status();
  Rows rows;
  const auto read = (*follower)->Read(weights->version.generation(), weights->version.step(), -1,
                                      absl::Now() + kPatience, &rows);
  if (!read.ok()) return read.status();
  EXPECT_TRUE(read->exact);
  status = harness->Drain();
  if (!status.ok()) return status;
  return End{*std::move(weights), std::move(rows.by_key)};
}

TEST(EmbeddingTables, ALostShardEndsWithTheSameRows) {
  // Followers hear of an eviction when the memory is taken back, which is not a part of the
  // promise.
  JobConfig job = CriteoJob(1);
  job.mutable_model()->mutable_embedding_tables(0)->set_evict_age_steps(0);
  End expected;
  {
    JobHarness undisturbed(job);
    undisturbed.set_data_dir(DataDirectory());
    ASSERT_TRUE(undisturbed.Start().ok());
    auto end = Finish(&undisturbed);
    ASSERT_TRUE(end.ok()) << end.status();
    expected = *std::move(end);
  }
  EXPECT_GT(expected.rows.size(), 100u);
  JobHarness harness(job, /*restart=*/true);
  harness.set_data_dir(DataDirectory());
  ASSERT_TRUE(harness.Start().ok());
  absl::Status status = harness.WaitForStep(0, 90);
  ASSERT_TRUE(status.ok()) << status;
  harness.Kill("alpha.shard.1");
  status = harness.WaitFor("the end of the victim", [&]() -> absl::StatusOr<bool> {
    return harness.member("alpha.shard.1").restarts == 1;
  });
  ASSERT_TRUE(status.ok()) << status;
  const auto end = Finish(&harness);
  ASSERT_TRUE(end.ok()) << end.status();
  EXPECT_EQ(FirstBitDifference(expected.weights, end->weights), "");
  ASSERT_EQ(expected.rows.size(), end->rows.size());
  for (const auto& [key, row] : expected.rows) {
    const auto found = end->rows.find(key);
    ASSERT_NE(found, end->rows.end()) << key;
    ASSERT_EQ(std::memcmp(row.data(), found->second.data(), row.size() * sizeof(float)), 0) << key;
  }
}

// Mode CHECKPOINTS: workers hold their teachers' tables too, those of groups and of files.
TEST(EmbeddingTables, WorkersFollowTheTablesOfTheirTeachers) {
  JobConfig job = CriteoJob(2);
  job.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  job.mutable_evaluator()->set_enabled(false);
  job.mutable_stop()->set_steps(120);
  const auto train = [](JobHarness* harness) {
    harness->set_data_dir(DataDirectory());
    absl::Status status = harness->Start();
    if (status.ok()) status = harness->WaitUntilDone();
    ASSERT_TRUE(status.ok()) << status;
    const auto history = harness->History(0);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->totals().first_step_used(), 61);
    EXPECT_EQ(history->totals().teacher_used_steps(), 60);
    EXPECT_EQ(history->totals().teacher_failures(), 0);
    status = harness->Drain();
    EXPECT_TRUE(status.ok()) << status;
  };
  JobHarness together(job);
  ASSERT_NO_FATAL_FAILURE(train(&together));

  job.mutable_groups()->RemoveLast();
  TeacherConfig* teacher = job.add_teachers();
  teacher->set_name("old");
  teacher->mutable_frozen()->set_archive(together.job().model().archive_dir() + "/beta.pt");
  teacher->mutable_frozen()->set_checkpoint(together.directory().checkpoints() + "/beta");
  JobHarness student(job);
  ASSERT_NO_FATAL_FAILURE(train(&student));
}

TEST(EmbeddingTables, GroupsTeachEachOtherAndFollowersHearOfEvictions) {
  JobHarness harness(CriteoJob(2));
  harness.set_data_dir(DataDirectory());
  absl::Status status = harness.Start();
  ASSERT_TRUE(status.ok()) << status;
  auto follower = Follow(&harness);
  ASSERT_TRUE(follower.ok()) << follower.status();
  // A follower of its own, from cut to cut by what changed.
  Rows rows;
  int64_t held = -1;
  uint64_t generation = 0;
  status = harness.WaitFor("the last cut", [&]() -> absl::StatusOr<bool> {
    const auto state = harness.State(0);
    if (!state.ok()) return state.status();
    const Version& cut = state->newest_cut();
    if (cut.step() > held && cut.generation() > 0) {
      Rows next = rows;
      const auto read =
          (*follower)->Read(cut.generation(), cut.step(), held, absl::Now() + kPatience, &next);
      if (read.ok() && read->exact) {
        generation = cut.generation();
        held = cut.step();
        rows = next;
      }
    }
    return held >= kSteps;
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_GT(rows.erased, 0);
  for (const char* name : {"alpha.shard.0", "alpha.shard.1"}) {
    const auto shard = harness.StatusOf(name);
    ASSERT_TRUE(shard.ok()) << shard.status();
    // Of a leader: all shards.
    ASSERT_EQ(shard->shards_size(), shard->members_size() > 0 ? 2 : 1) << name;
    for (const ShardLoad& load : shard->shards()) {
      ASSERT_GT(load.tables_size(), 0) << name;
      EXPECT_GT(load.tables(0).rows(), 0) << name;
      EXPECT_GT(load.tables(0).evicted(), 0) << name;
    }
  }
  status = harness.WaitUntilDone();
  ASSERT_TRUE(status.ok()) << status;
  Rows whole;
  const auto read = (*follower)->Read(generation, held, -1, absl::Now() + kPatience, &whole);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(rows.by_key, whole.by_key);
  for (int group = 0; group < 2; ++group) {
    const auto history = harness.History(group);
    ASSERT_TRUE(history.ok()) << history.status();
    EXPECT_EQ(history->totals().teacher_used_steps(), kSteps - 60);
    EXPECT_EQ(history->totals().teacher_failures(), 0);
    // How many of the cuts it evaluates depends on its speed; the last is always one.
    ASSERT_GT(history->evaluations_size(), 0);
    const EvaluationResult& last = history->evaluations(history->evaluations_size() - 1);
    EXPECT_TRUE(last.final());
    EXPECT_GT(last.auc(), 0.75);
  }
  status = harness.Drain();
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace codistill
