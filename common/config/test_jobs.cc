#include "common/config/test_jobs.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "common/config/job.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {

using ::testing::HasSubstr;

const char kGood[] = R"pb(
  name: "job"
  model {
    export {
      module: "mlp"
      options { key: "in_features" value: "32" }
    }
    inputs { name: "x" shape: 32 }
    num_outputs: 20
  }
  data {
    train { synthetic { hidden: 64 } }
    validation { synthetic { hidden: 64 stream: 1 } }
  }
  groups { name: "alpha" num_shards: 2 }
  groups { name: "beta" num_shards: 2 }
  training { batch_size: 32 publish_every_steps: 10 }
  codistillation { burn_in_steps: 30 }
  evaluation { every_steps: 20 }
  stop { steps: 100 }
)pb";

const char kCsv[] = R"pb(
  name: "csv"
  model {
    export { module: "ctr" }
    inputs { name: "numeric" shape: 2 }
    inputs { name: "categorical" dtype: DT_INT64 shape: 1 }
    num_outputs: 1
    label_loss: SIGMOID_CROSS_ENTROPY
  }
  data {
    train {
      csv {
        files: "train.csv"
        columns { name: "age" kind: NUMERIC }
        columns { name: "work" kind: CATEGORICAL }
        columns { name: "id" }
        columns { name: "gain" kind: NUMERIC log1p: true }
        columns {
          name: "income"
          kind: LABEL
          label_values { text: "<=50K" }
          label_values { text: ">50K" text: ">50K." }
        }
      }
    }
    validation {
      csv {
        files: "test.csv"
        fit_files: "train.csv"
        columns { name: "age" kind: NUMERIC }
        columns { name: "work" kind: CATEGORICAL }
        columns { name: "id" }
        columns { name: "gain" kind: NUMERIC log1p: true }
        columns {
          name: "income"
          kind: LABEL
          label_values { text: "<=50K" }
          label_values { text: ">50K" text: ">50K." }
        }
      }
    }
  }
  groups { name: "only" }
  training { batch_size: 32 }
  stop { steps: 100 }
)pb";

const char kText[] = R"pb(
  name: "text"
  model {
    export { module: "lstm_lm" }
    inputs { name: "tokens" dtype: DT_INT64 shape: 32 }
    states { name: "h" shape: 1 shape: -1 shape: 8 }
    num_outputs: 100
  }
  data {
    train { text { files: "a.txt" } }
    validation { text { files: "b.txt" vocabulary_files: "a.txt" } }
  }
  groups { name: "only" }
  training { batch_size: 8 }
  stop { steps: 10 }
)pb";

const char kImage[] = R"pb(
  name: "image"
  model {
    export { module: "resnet" }
    inputs { name: "image" shape: 3 shape: 32 shape: 32 }
    num_outputs: 10
  }
  data {
    train { image { files: "train.tar" random_flip: true random_crop_padding: 4 } }
    validation { image { files: "test.tar" } }
  }
  groups { name: "only" }
  training { batch_size: 8 }
  stop { steps: 10 }
)pb";

std::string WriteJob(const std::string& text) {
  const std::string path = JoinPath(std::getenv("TEST_TMPDIR"), "job.textproto");
  EXPECT_TRUE(WriteFileAtomically(path, text).ok());
  return path;
}

JobConfig Good(const std::string& text) {
  auto job = LoadJob(WriteJob(text));
  EXPECT_TRUE(job.ok()) << job.status();
  return job.ok() ? *std::move(job) : JobConfig();
}

std::vector<std::string> Mistakes(const std::string& text,
                                  const std::vector<std::string>& overrides) {
  const auto job = LoadJob(WriteJob(text), overrides);
  if (job.ok()) return {};
  std::vector<std::string> lines = absl::StrSplit(job.status().message(), '\n');
  EXPECT_THAT(lines[0], HasSubstr("job.textproto:"));
  lines.erase(lines.begin());
  return lines;
}

}  // namespace codistill
