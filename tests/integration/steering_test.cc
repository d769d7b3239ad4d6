// A job that runs: what it says of itself, and how it is stopped and taken up again.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/grpc_probe.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/prometheus_text.h"

namespace codistill {
namespace {

using nlohmann::json;

// Never ends by itself.
JobConfig EndlessJob(const std::string& name) {
  JobConfig job = MlpJob(name, 2);
  job.mutable_stop()->set_steps(100000000);
  job.mutable_evaluator()->set_enabled(true);
  job.mutable_evaluation()->set_every_steps(200);
  job.mutable_evaluation()->set_max_examples(64);
  return job;
}

// A job in mid-run.
class SteeringTest : public testing::Test {
 protected:
  void Begin(const JobConfig& job) {
    out_ = NewDirectory(job.name()) + "/run";
    run_ = std::make_unique<Command>(CtlArgv({"run", WriteJob(job), "--out", out_}));
    ASSERT_TRUE(WaitUntil([&] {
      return !run_->running() || access((out_ + "/run/evaluator.json").c_str(), F_OK) == 0;
    }));
    ASSERT_TRUE(run_->running()) << run_->Err();
    status_ = AwaitStatus(out_, 30);
    ASSERT_FALSE(status_.is_null()) << run_->Err();
  }

  // Waits until the evaluator, the last to begin, has measured both groups, and asks everyone
  // again.
  void AwaitEvaluations() {
    ASSERT_TRUE(WaitUntil([this] {
      status_ = AwaitStatus(out_, 30);
      if (status_.is_null()) return true;
      int measured = 0;
      for (const json& daemon : status_["daemons"]) {
        const json& status = daemon["status"];
        if (status.contains("history") && !status["history"]["evaluations"].empty()) ++measured;
      }
      return measured == 2;
    }));
    ASSERT_FALSE(status_.is_null());
  }

  OrphanCatcher catcher_;
  std::string out_;
  std::unique_ptr<Command> run_;
  json status_;
};

httplib::Result Get(const json& status, const std::string& path) {
  httplib::Client client("http://" + status["http_address"].get<std::string>());
  client.set_connection_timeout(10);
  client.set_read_timeout(10);
  return client.Get(path);
}

void CheckStatus(const std::string& name, const json& status) {
  EXPECT_EQ(status["job"], "steered");
  EXPECT_GT(status["pid"], 0);
  EXPECT_GT(status["uptime_seconds"].get<double>(), 0);
  EXPECT_FALSE(status["version"].get<std::string>().empty());
  EXPECT_FALSE(status["state"].get<std::string>().empty());
  EXPECT_FALSE(status["address"].get<std::string>().empty());
  EXPECT_FALSE(status["rate_unit"].get<std::string>().empty());
  const std::string kind = name == "evaluator"                       ? "evaluator"
                           : absl::StrContains(name, ".shard.")      ? "parameter_server"
                           : absl::StrContains(name, ".prediction.") ? "prediction_server"
                                                                     : "worker";
  EXPECT_EQ(status["kind"], kind);
  if (kind != "evaluator") {
    EXPECT_EQ(status["group"], name.substr(0, name.find('.')));
  }
  if (kind == "parameter_server") {
    EXPECT_EQ(status["state"], status["index"] == 0 ? "training" : "serving");
  }
  if (kind == "worker") {
    EXPECT_GT(status["worker"]["steps"], 0);
  }
  if (kind == "prediction_server") {
    EXPECT_EQ(status["models"].size(), 1u);
  }
}

void CheckHttp(const json& status) {
  const httplib::Result page = Get(status, "/statusz");
  ASSERT_TRUE(page) << httplib::to_string(page.error());
  EXPECT_EQ(page->status, 200);
  EXPECT_TRUE(absl::StrContains(page->body, status["kind"].get<std::string>())) << page->body;
  for (const char* path : {"/healthz", "/readyz"}) {
    const httplib::Result answer = Get(status, path);
    ASSERT_TRUE(answer) << path;
    EXPECT_EQ(answer->status, 200) << path << ": " << answer->body;
  }
  const httplib::Result nothing = Get(status, "/no_such_page");
  ASSERT_TRUE(nothing);
  EXPECT_EQ(nothing->status, 404);

  const httplib::Result metrics = Get(status, "/metrics");
  ASSERT_TRUE(metrics) << httplib::to_string(metrics.error());
  EXPECT_EQ(metrics->status, 200);
  EXPECT_TRUE(absl::StartsWith(metrics->get_header_value("Content-Type"), "text/plain"));
  const auto samples = ParsePrometheus(metrics->body);
  ASSERT_TRUE(samples.ok()) << samples.status() << "\n" << metrics->body;
  EXPECT_GT(samples->size(), 3u);
  bool ours = false;
  for (const PrometheusSample& sample : *samples) {
    if (!absl::StartsWith(sample.name, "codistill_")) continue;
    ours = true;
    const auto job = sample.labels.find("job");
    ASSERT_NE(job, sample.labels.end()) << sample.name;
    EXPECT_EQ(job->second, "steered");
  }
  EXPECT_TRUE(ours) << metrics->body;
}

void CheckGrpc(const json& status) {
  const std::string address = status["address"].get<std::string>();
  const auto healthy = Healthy(address, absl::Seconds(20));
  ASSERT_TRUE(healthy.ok()) << healthy.status();
  EXPECT_TRUE(*healthy);
  const auto services = ReflectedServices(address, absl::Seconds(20));
  ASSERT_TRUE(services.ok()) << services.status();
  std::vector<std::string> wanted = {"codistill.Control", "grpc.health.v1.Health"};
  if (status["kind"] == "parameter_server") wanted.push_back("codistill.Shard");
  if (status["kind"] == "parameter_server" && status["index"] == 0) {
    wanted.push_back("codistill.Leader");
  }
  if (status["kind"] == "prediction_server") wanted.push_back("inference.GRPCInferenceService");
  for (const std::string& service : wanted) {
    EXPECT_TRUE(absl::StrContains(*services, service)) << service << " in " << *services;
  }
}

TEST_F(SteeringTest, EveryDaemonAnswersOperators) {
  Begin(EndlessJob("steered"));
  AwaitEvaluations();
  std::set<std::string> names;
  for (const json& daemon : status_["daemons"]) {
    const std::string name = daemon["name"].get<std::string>();
    SCOPED_TRACE(name);
    names.insert(name);
    CheckStatus(name, daemon["status"]);
    CheckHttp(daemon["status"]);
    CheckGrpc(daemon["status"]);
  }
  EXPECT_EQ(names, (std::set<std::string>{"alpha.shard.0", "alpha.shard.1", "alpha.prediction.0",
                                          "alpha.worker.0", "beta.shard.0", "beta.shard.1",
                                          "beta.prediction.0", "beta.worker.0", "evaluator"}));

  // The table for people has the same.
  const CommandResult table = Ctl({"status", out_});
  EXPECT_TRUE(table.exit.clean()) << table.err;
  for (const std::string& name : names) EXPECT_TRUE(absl::StrContains(table.out, name)) << name;
  EXPECT_TRUE(absl::StrContains(table.out, "steps/s")) << table.out;

  // A checkpoint now, of one group.
  const CommandResult checkpoint = Ctl({"checkpoint", out_, "--group", "alpha", "--json"});
  ASSERT_TRUE(checkpoint.exit.clean()) << checkpoint.err;
  const json written = ParseJson(checkpoint.out);
  ASSERT_EQ(written.size(), 1u);
  EXPECT_EQ(VerifiedCheckpoints(out_, "alpha"),
            (std::vector<int64_t>{written[0]["step"].get<int64_t>()}));
  EXPECT_EQ(access(written[0]["manifest"].get<std::string>().c_str(), F_OK), 0);
  EXPECT_TRUE(VerifiedCheckpoints(out_, "beta").empty());

  // Mistakes are answered.
  const CommandResult group = Ctl({"checkpoint", out_, "--group", "delta"});
  EXPECT_NE(group.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(group.err, "delta") && absl::StrContains(group.err, "alpha"))
      << group.err;
  const CommandResult setting = Ctl({"set", out_, "no_such_setting", "1"});
  EXPECT_NE(setting.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(setting.err, "setting")) << setting.err;
}

// What the leader of a group says of it.
std::string PhaseOf(const json& status, const std::string& leader) {
  for (const json& daemon : status["daemons"]) {
    if (daemon["name"] == leader) return daemon["status"]["group_state"]["phase"];
  }
  return "";
}

TEST_F(SteeringTest, PauseAndResumeOneGroup) {
  Begin(EndlessJob("paused"));
  const CommandResult pause = Ctl({"pause", out_, "--group", "beta"});
  EXPECT_TRUE(pause.exit.clean()) << pause.err;
  EXPECT_TRUE(WaitUntil([this] {
    const json status = AwaitStatus(out_, 0);
    return PhaseOf(status, "beta.shard.0") == "PAUSED" &&
           PhaseOf(status, "alpha.shard.0") == "TRAINING";
  }));
  const CommandResult resume = Ctl({"resume", out_});
  EXPECT_TRUE(resume.exit.clean()) << resume.err;
  EXPECT_TRUE(
      WaitUntil([this] { return PhaseOf(AwaitStatus(out_, 0), "beta.shard.0") == "TRAINING"; }));
}

TEST_F(SteeringTest, DrainEndsTheRunWithCheckpoints) {
  Begin(EndlessJob("drained"));
  const CommandResult drain = Ctl({"drain", out_});
  EXPECT_TRUE(drain.exit.clean()) << drain.err;
  const CommandResult result = run_->Wait();
  EXPECT_EQ(result.exit.exit_code, 130) << result.exit.ToString() << result.err;
  EXPECT_EQ(result.exit.signal, 0);
  EXPECT_TRUE(ProcessesWith(out_).empty());
  for (const char* group : {"alpha", "beta"}) {
    const std::vector<int64_t> steps = VerifiedCheckpoints(out_, group);
    ASSERT_FALSE(steps.empty()) << group;
    EXPECT_GE(steps.back(), 30);
  }
}

TEST_F(SteeringTest, InterruptDrainsAndResumeCompletes) {
  Begin(EndlessJob("interrupted"));
  run_->Signal(SIGINT);
  const CommandResult result = run_->Wait();
  EXPECT_EQ(result.exit.exit_code, 130) << result.exit.ToString() << result.err;
  EXPECT_TRUE(ProcessesWith(out_).empty());
  const std::vector<int64_t> steps = VerifiedCheckpoints(out_, "alpha");
  ASSERT_FALSE(steps.empty());
  const int64_t reached = steps.back();
  EXPECT_GE(reached, 30);
  EXPECT_NE(access((out_ + "/summary.json").c_str(), F_OK), 0);

  const int64_t stop = std::max(reached, VerifiedCheckpoints(out_, "beta").back()) + 50;
  const CommandResult resumed =
      Ctl({"run", WriteJob(EndlessJob("interrupted")), "--out", out_, "--resume", "--steps",
           absl::StrCat(stop), "--set", "evaluation.every_steps=0"});
  ASSERT_TRUE(resumed.exit.clean()) << resumed.exit.ToString() << resumed.err;
  const json summary = ReadJson(out_ + "/summary.json");
  for (const json& group : summary["groups"]) {
    EXPECT_EQ(group["steps"], stop);
    // It went on where it was: no example was computed again.
    EXPECT_EQ(group["examples"], stop * 32);
  }
}

TEST_F(SteeringTest, NothingSurvivesTheDeathOfCodistillctl) {
  Begin(EndlessJob("orphaned"));
  ASSERT_GE(ProcessesWith(out_).size(), 10u);  // nine daemons and codistillctl
  const absl::Time killed = absl::Now();
  run_->Signal(SIGKILL);
  EXPECT_TRUE(WaitUntil([this] { return ProcessesWith(out_).empty(); }));
  EXPECT_LE(absl::Now() - killed, absl::Seconds(30));
}

}  // namespace
}  // namespace codistill
