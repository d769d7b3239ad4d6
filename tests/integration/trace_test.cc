// What a worker's trace shows of a run: that transfers go on while the model's passes are computed.

#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using nlohmann::json;

constexpr int64_t kSteps = 12;

// Of what goes on beside the passes, by its time. Nothing of what is done after them would be.
// Eight daemons that share two cores lag behind a little: 0.7 to 0.95 there.
constexpr double kHidden = 0.5;

// Passes that take tens of milliseconds.
JobConfig WideJob(const std::string& name, int num_groups, const std::string& hidden) {
  JobConfig job = MlpJob(name, num_groups);
  for (ModelExport::Option& option : *job.mutable_model()->mutable_export_()->mutable_options()) {
    if (option.key() == "hidden") option.set_value(hidden);
  }
  job.mutable_training()->set_batch_size(256);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

// deploy/trace_summary.py of one daemon's trace of a run.
json Summary(const std::string& out, const std::string& daemon) {
  const CommandResult result = Command({"/usr/bin/python3", RunfilesPath("deploy/trace_summary.py"),
                                        "--json", absl::StrCat(out, "/trace/", daemon, ".json")})
                                   .Wait();
  EXPECT_TRUE(result.exit.clean()) << result.err;
  return result.exit.clean() ? ParseJson(result.out) : json();
}

// Spans of a category in a daemon's trace of a run.
int64_t SpansOf(const std::string& out, const std::string& daemon, const std::string& category) {
  int64_t spans = 0;
  const json trace = ReadJson(absl::StrCat(out, "/trace/", daemon, ".json"));
  for (const json& event : trace["traceEvents"]) {
    spans += event["ph"] == "X" && event["cat"] == category ? 1 : 0;
  }
  return spans;
}

TEST(TraceTest, TheFirstGradientLeavesBeforeHalfOfTheBackwardPass) {
  OrphanCatcher catcher;
  JobConfig job = WideJob("first-gradient", 1, "1024,1024");
  const std::string out = NewDirectory("first-gradient") + "/run";
  const CommandResult run = Ctl({"run", WriteJob(job), "--out", out, "--trace"});
  ASSERT_TRUE(run.exit.clean()) << run.err;
  const json worker = Summary(out, "alpha.worker.0");
  ASSERT_TRUE(worker.is_object());
  EXPECT_EQ(worker["steps"], kSteps - 2);
  // As a fraction of the pass, the median over the steps: a busy machine slows both alike.
  EXPECT_GT(worker["compute"]["backward"].get<double>(), 5.0);
  EXPECT_LT(worker["first_gradient_at"].get<double>(), 0.5);

  // Six gradients, each once a step, as the shards' pieces.
  const json trace = ReadJson(out + "/trace/alpha.worker.0.json");
  std::map<std::string, int> frames;
  for (const json& event : trace["traceEvents"]) {
    if (event["ph"] == "X" && event["cat"] == "push") ++frames[event["args"]["tensor"]];
  }
  EXPECT_EQ(frames.count("fc2.weight"), 1u);
  EXPECT_GE(frames["fc2.weight"], kSteps);

  for (const std::string name : {"alpha.shard.0", "alpha.shard.1"}) {
    EXPECT_EQ(SpansOf(out, name, "update"), kSteps) << name;
  }
}

TEST(TraceTest, TeacherCallsAndPushesGoOnUnderCompute) {
  OrphanCatcher catcher;
  // Gradients of equal size come all along the backward pass; only the first layers' can be sent
  // after it.
  JobConfig job = WideJob("overlap", 2, "768,768,768,768,768,768");
  job.mutable_codistillation()->set_prefetch(2);
  const std::string out = NewDirectory("overlap") + "/run";
  const CommandResult run = Ctl({"run", WriteJob(job), "--out", out, "--trace"});
  ASSERT_TRUE(run.exit.clean()) << run.err;
  for (const std::string name : {"alpha.worker.0", "beta.worker.0"}) {
    SCOPED_TRACE(name);
    const json worker = Summary(out, name);
    ASSERT_TRUE(worker.is_object());
    const json& kinds = worker["kinds"];
    EXPECT_GE(kinds["teacher"]["spans"], kSteps / 2);
    EXPECT_GE(kinds["teacher"]["under_compute"].get<double>(), kHidden) << worker.dump(2);
    EXPECT_GE(kinds["push"]["under_compute"].get<double>(), kHidden) << worker.dump(2);
    EXPECT_GT(kinds["batch"]["spans"], 0);
  }
  for (const std::string name : {"alpha.prediction.0", "beta.prediction.0"}) {
    EXPECT_GE(SpansOf(out, name, "pass"), kSteps / 2) << name;
  }
}

// What happens between two steps without it happens under one with it.
TEST(TraceTest, WithWeightsLagPullsAndDecisionsGoOnUnderComputeToo) {
  OrphanCatcher catcher;
  double exposed[2] = {};  // of a step's time
  for (const int lag : {0, 1}) {
    SCOPED_TRACE(lag);
    JobConfig job = WideJob("lag", 1, "768,768,768,768,768,768");
    job.mutable_training()->set_weights_lag(lag);
    const std::string out = NewDirectory("lag") + "/run";
    const CommandResult run = Ctl({"run", WriteJob(job), "--out", out, "--trace"});
    ASSERT_TRUE(run.exit.clean()) << run.err;
    const json worker = Summary(out, "alpha.worker.0");
    ASSERT_TRUE(worker.is_object());
    for (const std::string kind : {"pull", "decision"}) {
      const double hidden = worker["kinds"][kind]["under_compute"].get<double>();
      if (lag == 0) {
        EXPECT_LT(hidden, 0.1) << worker.dump(2);
      } else {
        EXPECT_GE(hidden, 0.5) << worker.dump(2);
      }
      exposed[lag] +=
          worker["kinds"][kind]["exposed_ms"].get<double>() / worker["step_ms"].get<double>();
    }
  }
  EXPECT_LT(exposed[1], 0.5 * exposed[0]);
}

}  // namespace
}  // namespace codistill
