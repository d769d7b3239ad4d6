#include "common/config/embedding.h"

#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "common/config/job.h"
#include "common/config/test_jobs.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::StartsWith;

// kCsv with its categorical column in a table.
std::string WithTable() {
  return absl::StrReplaceAll(kCsv, {{"inputs { name: \"categorical\" dtype: DT_INT64 shape: 1 }",
                                     "inputs { name: \"rows\" field: \"hashed\" dtype: DT_INT64 "
                                     "shape: 1 embedding_table: \"t\" }"
                                     "embedding_tables { name: \"t\" dim: 8 }"},
                                    {"kind: CATEGORICAL", "kind: HASHED"}});
}

TEST(Embedding, AJobWithATableIsValid) { EXPECT_THAT(Mistakes(WithTable()), IsEmpty()); }

TEST(Embedding, ForwardTakesRowsWhereDataBringKeys) {
  const JobConfig job = Good(WithTable());
  const ModelInput& input = job.model().inputs(1);
  EXPECT_EQ(InputField(input), "hashed");
  EXPECT_EQ(InputField(job.model().inputs(0)), "numeric");
  const ModelConfig forward = ForwardConfig(job.model());
  EXPECT_EQ(forward.inputs(0).dtype(), DT_FLOAT);
  EXPECT_THAT(forward.inputs(0).shape(), ElementsAre(2));
  EXPECT_EQ(forward.inputs(1).name(), "rows");
  EXPECT_EQ(forward.inputs(1).dtype(), DT_FLOAT);
  EXPECT_THAT(forward.inputs(1).shape(), ElementsAre(1, 8));
}

TEST(Embedding, SeedsDifferBetweenJobsGroupsAndTables) {
  JobConfig job = Good(WithTable());
  const uint64_t seed = EmbeddingSeed(job, 0, 0);
  EXPECT_EQ(EmbeddingSeed(job, 0, 0), seed);
  job.mutable_groups(0)->set_name("other");
  EXPECT_NE(EmbeddingSeed(job, 0, 0), seed);
  job = Good(WithTable());
  job.mutable_model()->mutable_embedding_tables(0)->set_seed(1);
  EXPECT_NE(EmbeddingSeed(job, 0, 0), seed);
  job = Good(WithTable());
  job.set_seed(job.seed() + 1);
  EXPECT_NE(EmbeddingSeed(job, 0, 0), seed);
}

TEST(Embedding, RatesFollowTheDenseSchedule) {
  JobConfig job = Good(WithTable());
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.5f);
  RowOptimizerConfig rows;
  rows.set_learning_rate(0.25f);
  EXPECT_DOUBLE_EQ(EmbeddingLearningRate(job, rows, 0.5), 0.25);
  EXPECT_DOUBLE_EQ(EmbeddingLearningRate(job, rows, 0.125), 0.0625);
}

struct Rule {
  std::vector<std::string> overrides;
  const char* message;
};

class Rules : public testing::TestWithParam<Rule> {};

TEST_P(Rules, AreEnforced) {
  EXPECT_THAT(Mistakes(WithTable(), GetParam().overrides),
              ElementsAre(StartsWith(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    Tables, Rules,
    testing::ValuesIn(std::vector<Rule>{
        {{"model.inputs[1].dtype=DT_FLOAT"}, "model.inputs[1].dtype: not that of the field"},
        {{"model.inputs[1].field=other"},
         "model.inputs[1].field: no field of data.train (other); numeric or hashed would be right"},
        {{"model.inputs[0].shared_keys=true"},
         "model.inputs[0].shared_keys: only possible with embedding_table"},
        {{"model.inputs[0].embedding_table=t"},
         "model.inputs[0].dtype: keys of an embedding table are integers (DT_FLOAT); DT_INT64"},
        {{"model.embedding_tables[0].dim=0"}, "model.embedding_tables[0].dim: out of range (0)"},
        {{"model.embedding_tables[0].dim=5000"}, "model.embedding_tables[0].dim: out of range"},
        {{"model.embedding_tables[0].init_scale=-1"},
         "model.embedding_tables[0].init_scale: out of range (-1)"},
        {{"model.embedding_tables[0].optimizer.learning_rate=0"},
         "model.embedding_tables[0].optimizer.learning_rate: out of range (0)"},
        {{"model.embedding_tables[0].admission_min_count=0"},
         "model.embedding_tables[0].admission_min_count: out of range (0)"},
        {{"model.embedding_tables[0].evict_age_steps=-1"},
         "model.embedding_tables[0].evict_age_steps: too small (-1)"},
        {{"model.embedding_tables[0].max_bytes=1000"},
         "model.embedding_tables[0].max_bytes: too small (1000); at least 1048576"},
    }));

TEST(Embedding, AnInputNamesATableThatExists) {
  EXPECT_THAT(Mistakes(WithTable(), {"model.inputs[1].embedding_table=u"}),
              ElementsAre("model.inputs[1].embedding_table: no such table (u); t would be right",
                          StartsWith("model.embedding_tables[0].name: no input has rows of it")));
}

TEST(Embedding, MistakesAreReportedTogether) {
  const std::string text = absl::StrReplaceAll(
      WithTable(), {{"embedding_tables { name: \"t\" dim: 8 }",
                     "embedding_tables { name: \"t\" dim: 8 } embedding_tables { name: \"t\" } "
                     "embedding_tables { name: \"idle\" dim: 4 }"}});
  EXPECT_THAT(
      Mistakes(text),
      ElementsAre(StartsWith("model.embedding_tables[1].dim: missing; the number of floats"),
                  StartsWith("model.embedding_tables[1].name: used twice (t)"),
                  StartsWith("model.embedding_tables[2].name: no input has rows of it")));
}

}  // namespace
}  // namespace codistill
