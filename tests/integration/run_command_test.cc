// `codistillctl run` as a process, from the job file to what it leaves on disk.

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/base/file.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using nlohmann::json;

bool Exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

std::set<std::string> Keys(const json& object) {
  std::set<std::string> keys;
  for (const auto& item : object.items()) keys.insert(item.key());
  return keys;
}

// A whole run, shared by the tests that look at what it has left.
class RunOutputsTest : public testing::Test {
 protected:
  static constexpr int kSteps = 200;
  static constexpr int kBurnIn = 40;

  static void SetUpTestSuite() {
    OrphanCatcher catcher;
    JobConfig job = MlpJob("outputs", 2);
    job.mutable_stop()->set_steps(kSteps);
    job.mutable_codistillation()->set_burn_in_steps(kBurnIn);
    job.mutable_codistillation()->set_max_staleness_steps(150);
    job.mutable_evaluator()->set_enabled(true);
    job.mutable_checkpoint()->set_every_steps(50);
    out_ = new std::string(NewDirectory("outputs") + "/run");
    result_ = new CommandResult(Ctl({"run", WriteJob(job), "--out", *out_}));
  }
  static void TearDownTestSuite() {
    delete out_;
    delete result_;
  }
  void SetUp() override {
    ASSERT_TRUE(result_->exit.clean()) << result_->exit.ToString() << "\n" << result_->err;
  }

  static std::string* out_;
  static CommandResult* result_;
};

std::string* RunOutputsTest::out_ = nullptr;
CommandResult* RunOutputsTest::result_ = nullptr;

TEST_F(RunOutputsTest, SummaryHasEveryField) {
  const json summary = ReadJson(*out_ + "/summary.json");
  EXPECT_EQ(Keys(summary),
            (std::set<std::string>{"job", "wall_seconds", "group_disagreement", "groups"}));
  EXPECT_EQ(summary["job"], "outputs");
  EXPECT_GT(summary["wall_seconds"].get<double>(), 0);
  EXPECT_GT(summary["group_disagreement"].get<double>(), 0);
  EXPECT_LT(summary["group_disagreement"].get<double>(), 1);
  ASSERT_EQ(summary["groups"].size(), 2u);
  int index = 0;
  for (const json& group : summary["groups"]) {
    for (const char* field : {"name", "steps", "examples", "examples_per_second", "final",
                              "push_bytes", "pull_bytes", "teacher"}) {
      EXPECT_TRUE(group.contains(field)) << field;
    }
    EXPECT_EQ(group["name"], index++ == 0 ? "alpha" : "beta");
    EXPECT_EQ(group["steps"], kSteps);
    EXPECT_EQ(group["examples"], kSteps * 32);
    EXPECT_GT(group["examples_per_second"].get<double>(), 0);
    // Each step moves every weight once in each direction, and some headers.
    const double weights = 4.0 * (32 * 768 + 768 + 768 * 16 + 16 + 16 * 8 + 8);
    for (const char* field : {"push_bytes", "pull_bytes"}) {
      EXPECT_GE(group[field].get<double>(), kSteps * weights) << field;
      EXPECT_LE(group[field].get<double>(), 1.2 * (kSteps + 3) * weights) << field;
    }
    // There are eight classes: an accuracy, and no AUC.
    EXPECT_EQ(Keys(group["final"]),
              (std::set<std::string>{"validation_loss", "validation_accuracy"}));
    EXPECT_GT(group["final"]["validation_loss"].get<double>(), 0);
    EXPECT_GT(group["final"]["validation_accuracy"].get<double>(), 0.125);
    EXPECT_EQ(Keys(group["teacher"]),
              (std::set<std::string>{"requests", "failures", "used_steps", "skipped_steps",
                                     "hedged_requests", "late_answers", "first_step_used",
                                     "max_staleness_steps", "mean_staleness_steps",
                                     "mean_prefetch_lag_steps", "teachers"}));
    ASSERT_EQ(group["teacher"]["teachers"].size(), 1u);
    EXPECT_EQ(group["teacher"]["teachers"][0]["name"], group["teachers"][0]);
    EXPECT_EQ(group["teachers"][0], group["name"] == "alpha" ? "beta" : "alpha");
    EXPECT_EQ(group["teacher"]["used_steps"], kSteps - kBurnIn);
    EXPECT_GE(group["teacher"]["requests"], kSteps - kBurnIn);
    EXPECT_EQ(group["teacher"]["first_step_used"], kBurnIn + 1);
    EXPECT_EQ(group["teacher"]["skipped_steps"], 0);
    EXPECT_LE(group["teacher"]["max_staleness_steps"], 150);
    EXPECT_LE(group["teacher"]["mean_staleness_steps"], group["teacher"]["max_staleness_steps"]);
  }
}

TEST_F(RunOutputsTest, MetricsAreCurves) {
  const auto text = ReadFile(*out_ + "/metrics.csv", 64 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  const std::vector<std::string> lines = absl::StrSplit(*text, '\n', absl::SkipEmpty());
  ASSERT_GT(lines.size(), 10u);
  EXPECT_EQ(lines[0], "group,step,name,value");
  std::set<std::string> seen;
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::vector<std::string> cells = absl::StrSplit(lines[i], ',');
    ASSERT_EQ(cells.size(), 4u) << lines[i];
    EXPECT_TRUE(cells[0] == "alpha" || cells[0] == "beta") << lines[i];
    int64_t step = -1;
    double value = 0;
    ASSERT_TRUE(absl::SimpleAtoi(cells[1], &step) && absl::SimpleAtod(cells[3], &value))
        << lines[i];
    EXPECT_LE(step, kSteps);
    seen.insert(absl::StrCat(cells[0], ",", cells[2], step == kSteps ? " at the end" : ""));
  }
  for (const char* group : {"alpha", "beta"}) {
    for (const char* name : {"train_loss", "teacher_loss", "learning_rate", "examples_per_second",
                             "validation_loss", "validation_accuracy"}) {
      EXPECT_EQ(seen.count(absl::StrCat(group, ",", name, " at the end")), 1u) << group << name;
    }
    EXPECT_EQ(seen.count(absl::StrCat(group, ",train_loss")), 1u) << "no curve";
  }
}

TEST_F(RunOutputsTest, ReportStandsByItself) {
  const auto text = ReadFile(*out_ + "/report.html", 64 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  for (const char* wanted : {"<html", "</html>", "<svg", "alpha", "beta", "outputs"}) {
    EXPECT_TRUE(absl::StrContains(*text, wanted)) << wanted;
  }
  for (const char* unwanted : {"<script", "<link", "src=", "@import", "url("}) {
    EXPECT_FALSE(absl::StrContains(*text, unwanted)) << unwanted;
  }
}

TEST_F(RunOutputsTest, LogsAndCheckpointsAreThere) {
  for (const char* daemon :
       {"alpha.shard.0", "alpha.shard.1", "alpha.prediction.0", "alpha.worker.0", "beta.shard.0",
        "beta.shard.1", "beta.prediction.0", "beta.worker.0", "evaluator"}) {
    const std::string path = absl::StrCat(*out_, "/logs/", daemon, ".log");
    struct stat st;
    ASSERT_EQ(stat(path.c_str(), &st), 0) << path;
    EXPECT_GT(st.st_size, 0) << path << " has no ready line";
  }
  for (const char* group : {"alpha", "beta"}) {
    // Two are kept.
    EXPECT_EQ(VerifiedCheckpoints(*out_, group), (std::vector<int64_t>{150, 200}));
  }
}

TEST_F(RunOutputsTest, ProgressIsShown) {
  EXPECT_TRUE(absl::StrContains(result_->out, "step 200/200")) << result_->out;
  EXPECT_TRUE(absl::StrContains(result_->out, "examples/s")) << result_->out;
  EXPECT_TRUE(absl::StrContains(result_->out, *out_ + "/summary.json")) << result_->out;
}

TEST_F(RunOutputsTest, NoDaemonIsLeft) { EXPECT_TRUE(ProcessesWith(*out_).empty()); }

TEST_F(RunOutputsTest, TheDirectoryIsRefusedForAnotherRun) {
  const auto before = ReadFile(*out_ + "/summary.json", 1 << 20);
  const CommandResult again = Ctl({"run", WriteJob(MlpJob("other", 1)), "--out", *out_});
  EXPECT_NE(again.exit.exit_code, 0);
  EXPECT_TRUE(absl::StrContains(again.err, *out_)) << again.err;
  EXPECT_TRUE(absl::StrContains(again.err, "--resume")) << again.err;
  const auto after = ReadFile(*out_ + "/summary.json", 1 << 20);
  ASSERT_TRUE(before.ok() && after.ok());
  EXPECT_EQ(*before, *after);
}

TEST(RunTest, OneSwitchTurnsTeachersOff) {
  OrphanCatcher catcher;
  const std::string out = NewDirectory("switch") + "/run";
  const CommandResult run = Ctl({"run", WriteJob(MlpJob("switch", 2)), "--out", out, "--set",
                                 "codistillation.enabled=false", "--set=evaluator.enabled=true",
                                 "--steps", "60", "--json"});
  ASSERT_TRUE(run.exit.clean()) << run.exit.ToString() << "\n" << run.err;
  const json summary = ReadJson(out + "/summary.json");
  for (const json& group : summary["groups"]) {
    EXPECT_EQ(group["steps"], 60);
    for (const auto& item : group["teacher"].items()) {
      const bool list = item.key() == "teachers";
      EXPECT_EQ(item.value(), list ? json::array() : json(0)) << item.key();
    }
    EXPECT_TRUE(group["teachers"].empty());
  }
  EXPECT_FALSE(Exists(out + "/logs/alpha.prediction.0.log"));
  // Every line of --json is JSON, the last one the summary.
  const std::vector<std::string> lines = absl::StrSplit(run.out, '\n', absl::SkipEmpty());
  ASSERT_FALSE(lines.empty());
  for (const std::string& line : lines) EXPECT_FALSE(ParseJson(line).is_null());
  EXPECT_EQ(ParseJson(lines.back()), summary);
}

TEST(RunTest, LostDaemonsComeBackWithRestart) {
  OrphanCatcher catcher;
  JobConfig job = MlpJob("restart", 2);
  job.mutable_stop()->set_steps(2500);
  job.mutable_checkpoint()->set_every_steps(50);
  job.mutable_evaluator()->set_enabled(true);
  const std::string out = NewDirectory("restart") + "/run";
  Command run(CtlArgv({"run", WriteJob(job), "--out", out, "--restart"}));
  ASSERT_TRUE(WaitUntil([&] { return !run.running() || Exists(out + "/run/evaluator.json"); }));
  const json status = AwaitStatus(out, 60);
  ASSERT_FALSE(status.is_null()) << run.Err();
  for (const char* victim : {"alpha.shard.1", "beta.worker.0", "alpha.prediction.0", "evaluator"}) {
    for (const json& daemon : status["daemons"]) {
      if (daemon["name"] == victim) kill(daemon["status"]["pid"].get<pid_t>(), SIGKILL);
    }
  }
  const CommandResult result = run.Wait();
  ASSERT_TRUE(result.exit.clean()) << result.exit.ToString() << "\n" << result.out << result.err;
  EXPECT_TRUE(absl::StrContains(result.out, "alpha.shard.1 was killed by signal 9")) << result.out;
  const json summary = ReadJson(out + "/summary.json");
  ASSERT_EQ(summary["groups"].size(), 2u);
  for (const json& group : summary["groups"]) {
    EXPECT_EQ(group["steps"], 2500);
    EXPECT_GT(group["final"]["validation_loss"].get<double>(), 0);
    EXPECT_GT(group["teacher"]["requests"], 0);
  }
  EXPECT_GE(summary["groups"][0]["restores"], 1);
  EXPECT_GT(summary["group_disagreement"].get<double>(), 0);
  EXPECT_TRUE(ProcessesWith(out).empty());
}

}  // namespace
}  // namespace codistill
