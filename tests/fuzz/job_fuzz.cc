// Job files: whatever is in one, reading and validating it ends with mistakes that say where, or
// with a job that is the same after it was written and read again.

#include <string>
#include <vector>

#include "common/config/job.h"
#include "common/config/text_proto.h"
#include "glog/logging.h"
#include "google/protobuf/text_format.h"
#include "proto/job.pb.h"
#include "tests/fuzz/fuzz_target.h"

namespace codistill {

std::vector<std::string> FuzzSeeds() {
  return {
      R"(name: "quick" seed: 7
model { export { module: "mlp" options { key: "hidden" value: "64,64" } } inputs { name: "x" shape: 32 } num_outputs: 20 }
data { train { synthetic { inputs: 32 hidden: 64 classes: 20 } } validation { synthetic { inputs: 32 hidden: 64 classes: 20 stream: 1 } } }
groups { name: "north" num_shards: 2 num_workers: 2 } groups { name: "south" num_shards: 2 }
training { batch_size: 64 optimizer { kind: ADAM learning_rate: 1e-3 schedule { kind: COSINE warmup_steps: 10 } } publish_every_steps: 20 }
codistillation { burn_in_steps: 100 weight: 0.5 on_teacher_loss: WAIT }
evaluation { every_steps: 100 } checkpoint { every_steps: 200 keep: 2 } stop { steps: 1000 }
)",
      R"(# A table of text.
name: 'adult'
data: < train: < csv: < files: "adult.data" columns { name: "age" kind: NUMERIC }
  columns { name: "work" kind: CATEGORICAL cardinality: 9 }
  columns { name: "y" kind: LABEL label_values { text: "<=50K" } label_values { text: [">50K", ">50K."] } } > > >
stop { steps: 0x10 } seed: 18446744073709551615;
)",
      R"(name: "taught"
model { export { module: "mlp" } inputs { name: "x" shape: 32 } num_outputs: 20 }
data { train { synthetic { hidden: 64 } } validation { synthetic { hidden: 64 stream: 1 } } }
groups { name: "student" teachers: "both" teachers: "far" num_prediction_servers: 0 }
teachers { name: "old" frozen { archive: "old.pt" checkpoint: "checkpoints/old" follow: true } }
teachers { name: "older" frozen { archive: "/models/older.pt" } num_prediction_servers: 2 }
teachers { name: "both" ensemble { members: "old" members: "older" average: LOGITS } }
teachers { name: "far" external { model: "net" inputs { input: "x" server: "INPUT__0" } kind: PROBABILITIES } prediction_servers { address: "far:8001" } }
training { batch_size: 64 } codistillation { mode: PREDICTIONS hedge_after_ms: 20 } stop { steps: 1000 }
)",
      R"(name: "a\n\t\"\x41\101" groups [ { name: "b" } , { name: "c" devices: ["cpu", "cpu"] } ]
model { inputs { name: "tokens" dtype: DT_INT64 shape: [32] } states { name: "h" shape: [2, -1, 256] } label_smoothing: .1 }
data { train { text { files: "t" unroll: 32 } } } training { update_mode: ASYNC rejoin_timeout_s: inf } stop { steps: -5 }
)"};
}

void FuzzOne(absl::string_view input) {
  JobConfig job;
  const std::vector<TextProtoError> errors = ParseTextProto(input, &job);
  for (const TextProtoError& error : errors) {
    CHECK_GE(error.line, 1);
    CHECK_GE(error.column, 1);
    CHECK(!error.problem.empty());
  }
  ValidateJob(job).IgnoreError();
  if (!errors.empty()) return;
  std::string printed;
  CHECK(google::protobuf::TextFormat::PrintToString(job, &printed));
  JobConfig again;
  const std::vector<TextProtoError> none = ParseTextProto(printed, &again);
  CHECK(none.empty()) << none[0].ToString() << "\n" << printed;
  CHECK_EQ(job.SerializeAsString(), again.SerializeAsString()) << printed;
}

}  // namespace codistill
