#include "worker/evaluator.h"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "worker/testing/linear_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kInputs = 2;
constexpr int64_t kClasses = 3;
constexpr int64_t kStop = 30;

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

class FewExamples : public Dataset {
 public:
  explicit FewExamples(const DatasetConfig& config)
      : Dataset(config, SOFTMAX_CROSS_ENTROPY, MakeShape()) {}
  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    ++fills;
    Allocate(static_cast<int64_t>(refs.size()), batch);
    for (size_t r = 0; r < refs.size(); ++r) {
      for (int64_t i = 0; i < kInputs; ++i) {
        batch->fields[0].tensor.As<float>()[r * kInputs + i] =
            std::sin(static_cast<float>(refs[r].index + i));
      }
      SetClass(static_cast<int64_t>(r), refs[r].index % kClasses, batch);
      batch->example_ids.As<int64_t>()[r] = refs[r].index;
    }
    return absl::OkStatus();
  }
  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) ++counts[ref.index % kClasses];
  }
  mutable std::atomic<int> fills{0};

 private:
  static Shape MakeShape() {
    Shape shape;
    shape.size = 20;
    shape.num_classes = kClasses;
    return shape;
  }
};

// A followed model whose cuts a test publishes.
class PublishedModel : public FollowedModel {
 public:
  // The weights are a function of (salt, step).
  explicit PublishedModel(int salt) : salt_(salt) { state_.set_phase(GroupState::TRAINING); }

  void Publish(uint64_t generation, int64_t step) {
    auto model = std::make_shared<LinearModel>(kInputs, kClasses, false);
    for (int t = 0; t < 2; ++t) {
      const TensorView& view = model->storage()[t];
      for (int64_t i = 0; i < view.elements(); ++i) {
        static_cast<float*>(view.data)[i] = std::cos(static_cast<float>(i + salt_ * 5 + step));
      }
    }
    auto snapshot = std::make_shared<Snapshot>();
    snapshot->model = model;
    snapshot->version.set_generation(generation);
    snapshot->version.set_step(step);
    MutexLock lock(&mu_);
    *state_.mutable_newest_cut() = snapshot->version;
    held_ = snapshot;
  }
  void SetPhase(GroupState::Phase phase, const std::string& error = "") {
    MutexLock lock(&mu_);
    state_.set_phase(phase);
    state_.set_error(error);
  }
  void AnnounceOnly(uint64_t generation, int64_t step) {
    MutexLock lock(&mu_);
    state_.mutable_newest_cut()->set_generation(generation);
    state_.mutable_newest_cut()->set_step(step);
  }
  void SetSilence(absl::Duration silence) {
    MutexLock lock(&mu_);
    silence_ = silence;
  }

  absl::StatusOr<std::shared_ptr<const Snapshot>> Get() const override {
    MutexLock lock(&mu_);
    if (held_ == nullptr) return absl::UnavailableError("none yet");
    return held_;
  }
  absl::StatusOr<std::shared_ptr<const Snapshot>> WaitForNewer(const Version& than,
                                                               absl::Time deadline) override {
    MutexLock lock(&mu_);
    const auto newer = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return held_ != nullptr && (held_->version.generation() != than.generation() ||
                                  held_->version.step() > than.step());
    };
    if (!mu_.AwaitWithDeadline(absl::Condition(&newer), deadline)) {
      return absl::DeadlineExceededError("nothing newer");
    }
    return held_;
  }
  GroupState group_state() const override {
    MutexLock lock(&mu_);
    return state_;
  }
  absl::Duration group_silence() const override {
    MutexLock lock(&mu_);
    return silence_;
  }
  Counters counters() const override { return {}; }

 private:
  const int salt_;
  mutable Mutex mu_;
  GroupState state_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const Snapshot> held_ ABSL_GUARDED_BY(mu_);
  absl::Duration silence_ ABSL_GUARDED_BY(mu_);
};

// Keeps what is reported.
class ReportBook : public LeaderClient {
 public:
  absl::Status ReportEvaluation(EvaluationResult result, absl::Time) override {
    MutexLock lock(&mu_);
    if (on_report) on_report();
    if (result.version().generation() < generation) return absl::AbortedError("older generation");
    if (failures_left > 0) {
      --failures_left;
      return absl::UnavailableError("leader is starting");
    }
    results_.push_back(std::move(result));
    return absl::OkStatus();
  }
  std::vector<EvaluationResult> results() const {
    MutexLock lock(&mu_);
    return results_;
  }
  absl::StatusOr<RegisterReply> Register(RegisterRequest, absl::Time) override { return Not(); }
  absl::StatusOr<GetAssignmentsReply> GetAssignments(GetAssignmentsRequest, absl::Time) override {
    return Not();
  }
  absl::StatusOr<HeartbeatReply> Heartbeat(HeartbeatRequest, absl::Time) override { return Not(); }
  absl::Status ReportEnd(ReportEndRequest, absl::Time) override { return Not(); }
  absl::StatusOr<GetHistoryReply> GetHistory(absl::Time) override { return Not(); }

  std::atomic<int> failures_left{0};
  std::atomic<uint64_t> generation{1};
  std::function<void()> on_report;  // first of all

 private:
  static absl::Status Not() { return absl::UnimplementedError("not for evaluators"); }
  mutable Mutex mu_;
  std::vector<EvaluationResult> results_ ABSL_GUARDED_BY(mu_);
};

class EvaluatorTest : public ::testing::Test {
 protected:
  EvaluatorTest() {
    auto* input = job_.mutable_model()->add_inputs();
    input->set_name("x");
    input->add_shape(kInputs);
    job_.mutable_model()->set_num_outputs(kClasses);
    job_.mutable_data()->mutable_validation()->mutable_synthetic()->set_inputs(kInputs);
    job_.mutable_evaluation()->set_every_steps(10);
    job_.mutable_evaluation()->set_batch_size(6);
    job_.mutable_evaluation()->set_max_examples(7);
    job_.mutable_stop()->set_steps(kStop);
    for (const char* name : {"alpha", "beta"}) {
      auto* group = job_.add_groups();
      group->set_name(name);
      group->add_shards()->set_address(absl::StrCat(name, ":1"));
    }
    data_ = std::make_unique<FewExamples>(job_.data().validation());
    file_ = absl::StrCat(::testing::TempDir(), "/evaluation_",
                         ::testing::UnitTest::GetInstance()->current_test_info()->name(), ".json");
  }

  Evaluator::Options Options() {
    Evaluator::Options options;
    options.job = job_;
    options.validation = data_.get();
    options.groups = {{&alpha_, &alpha_book_}, {&beta_, &beta_book_}};
    options.evaluation_file = file_;
    options.poll = absl::Milliseconds(2);
    return options;
  }

  void FinishBoth() {
    for (PublishedModel* model : {&alpha_, &beta_}) {
      model->Publish(1, kStop);
      model->SetPhase(GroupState::FINISHED);
    }
  }

  JobConfig job_;
  std::unique_ptr<FewExamples> data_;
  PublishedModel alpha_{1}, beta_{2};
  ReportBook alpha_book_, beta_book_;
  std::string file_;
};

TEST_F(EvaluatorTest, MeasuresCutsAndThenTheLastOnesSideBySide) {
  Evaluator evaluator(Options());
  absl::Status status = absl::UnknownError("running");
  std::thread thread([&] { status = evaluator.Run(); });
  alpha_.Publish(1, 10);
  ASSERT_TRUE(Eventually([&] { return alpha_book_.results().size() == 1; }));
  EXPECT_FALSE(alpha_book_.results()[0].final());
  EXPECT_EQ(alpha_book_.results()[0].examples(), 7) << "evaluation.max_examples";
  EXPECT_EQ(alpha_book_.results()[0].version().step(), 10);

  alpha_.Publish(1, kStop);
  alpha_.SetPhase(GroupState::FINISHED);
  beta_.Publish(1, 20);
  ASSERT_TRUE(Eventually([&] { return beta_book_.results().size() == 1; }));
  EXPECT_EQ(alpha_book_.results().size(), 1u) << "the last cut waits for the other group's";
  // The phase comes before the cut is loaded: what is held is not the last one.
  beta_.AnnounceOnly(1, kStop);
  beta_.SetPhase(GroupState::FINISHED);
  beta_.Publish(1, kStop);
  thread.join();
  ASSERT_TRUE(status.ok()) << status;

  const EvaluationResult last = alpha_book_.results().back();
  EXPECT_TRUE(last.final());
  EXPECT_EQ(last.examples(), 20);
  EXPECT_EQ(last.version().step(), kStop);
  EXPECT_GT(last.loss(), 0);
  EXPECT_TRUE(beta_book_.results().back().final());
  const auto json = nlohmann::json::parse(*ReadFile(file_, 1 << 20));
  EXPECT_GT(json.at("group_disagreement").get<double>(), 0.001);
  ASSERT_EQ(json.at("groups").size(), 2u);
  EXPECT_EQ(json["groups"][0]["name"], "alpha");
  EXPECT_EQ(json["groups"][1]["step"], kStop);
  EXPECT_EQ(json["groups"][0]["loss"].get<double>(), last.loss());
  EXPECT_EQ(json["groups"][0]["accuracy"].get<double>(), last.accuracy());
  EXPECT_EQ(json["groups"][0]["examples"], 20);
  EXPECT_FALSE(json["groups"][0].contains("auc"));
  DaemonStatus daemon;
  evaluator.FillStatus(&daemon);
  EXPECT_EQ(daemon.state(), "finished");
}

TEST_F(EvaluatorTest, EqualModelsDoNotDisagree) {
  job_.mutable_evaluation()->set_every_steps(0);
  PublishedModel twin(1);
  Evaluator::Options options = Options();
  options.groups[1].model = &twin;
  FinishBoth();
  twin.Publish(1, kStop);
  twin.SetPhase(GroupState::FINISHED);
  Evaluator evaluator(std::move(options));
  ASSERT_TRUE(evaluator.Run().ok());
  const auto json = nlohmann::json::parse(*ReadFile(file_, 1 << 20));
  EXPECT_EQ(json.at("group_disagreement").get<double>(), 0);
}

TEST_F(EvaluatorTest, ReportsOfTheLastCutsAreRepeated) {
  alpha_book_.failures_left = 3;
  FinishBoth();
  Evaluator evaluator(Options());
  ASSERT_TRUE(evaluator.Run().ok());
  ASSERT_EQ(alpha_book_.results().size(), 1u);
  EXPECT_TRUE(alpha_book_.results()[0].final());
}

TEST_F(EvaluatorTest, AFinishedGroupThatIsRestoredIsMeasuredAgain) {
  job_.mutable_evaluation()->set_every_steps(0);
  FinishBoth();
  beta_book_.on_report = [this] {
    beta_book_.generation = 2;
    beta_.Publish(2, kStop);
  };
  Evaluator evaluator(Options());
  ASSERT_TRUE(evaluator.Run().ok());
  ASSERT_EQ(beta_book_.results().size(), 1u);
  EXPECT_EQ(beta_book_.results()[0].version().generation(), 2u);
}

TEST_F(EvaluatorTest, AFailedGroupIsNamed) {
  beta_.SetPhase(GroupState::FAILED, "worker 1 did not come back");
  Evaluator evaluator(Options());
  const absl::Status status = evaluator.Run();
  EXPECT_THAT(status.ToString(), HasSubstr("beta"));
  EXPECT_THAT(status.ToString(), HasSubstr("worker 1 did not come back"));
}

TEST_F(EvaluatorTest, AGroupThatIsNotHeardOfIsNamed) {
  beta_.SetSilence(absl::InfiniteDuration());
  Evaluator::Options options = Options();
  options.patience = absl::Milliseconds(30);
  Evaluator evaluator(std::move(options));
  const absl::Status status = evaluator.Run();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("beta:1"));
}

TEST_F(EvaluatorTest, DrainEndsIt) {
  Evaluator evaluator(Options());
  std::thread thread([&] { EXPECT_TRUE(evaluator.Run().ok()); });
  evaluator.Drain();
  thread.join();
  EXPECT_FALSE(FileSystem::Real()->Exists(file_));
}

TEST_F(EvaluatorTest, AnUnwritableFileIsAnError) {
  FinishBoth();
  Evaluator::Options options = Options();
  options.evaluation_file = "/nowhere/at/all.json";
  Evaluator evaluator(std::move(options));
  const absl::Status status = evaluator.Run();
  EXPECT_THAT(status.ToString(), HasSubstr("/nowhere/at"));
}

TEST_F(EvaluatorTest, WantsTheJobsCutsAndWhatIsBeyondTheEnd) {
  EXPECT_FALSE(Evaluator::Wants(job_, 0));
  EXPECT_TRUE(Evaluator::Wants(job_, 10));
  EXPECT_FALSE(Evaluator::Wants(job_, 11));
  EXPECT_TRUE(Evaluator::Wants(job_, kStop));
  EXPECT_TRUE(Evaluator::Wants(job_, kStop + 3));
}

}  // namespace
}  // namespace codistill
