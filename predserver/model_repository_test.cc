#include "predserver/model_repository.h"

#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "predserver/predictor_fixture.h"

namespace codistill {
namespace {

using testing::HasSubstr;

class ModelRepositoryTest : public PredictorTest {
 protected:
  ModelRepositoryTest() {
    ModelRepository::Options options;
    options.metrics = repository_metrics_.get();
    options.clock = &clock_;
    models_ = *ModelRepository::Create(options);
    options_.max_queue = 10;
    EXPECT_TRUE(models_->Add(options_).ok());
    options_.model = "beta";
    options_.followed = &other_;
    EXPECT_TRUE(models_->Add(options_).ok());
  }

  std::shared_ptr<Pending> Ask(const std::string& model) {
    auto pending = std::make_shared<Pending>();
    PredictionRequest request = Request();
    request.model = model;
    models_->Predict(std::move(request), [pending](absl::StatusOr<Prediction> result) {
      pending->result = std::move(result);
      pending->done.Notify();
    });
    return pending;
  }

  PuppetFollowedModel other_;
  const std::unique_ptr<Metrics> repository_metrics_ = Metrics::Create({});
  std::unique_ptr<ModelRepository> models_;
};

TEST_F(ModelRepositoryTest, FindsModelsByName) {
  other_.Hold(model_, 1, 7, clock_.Now());
  EXPECT_EQ(Ask("alpha")->Wait()->version.step(), 40);
  EXPECT_EQ(Ask("beta")->Wait()->version.step(), 7);
  EXPECT_EQ(Ask("gamma")->Wait().status(),
            absl::NotFoundError("no model \"gamma\" here; this server has \"alpha\", \"beta\""));
  EXPECT_EQ((*models_->Find("beta"))->model(), "beta");
  ASSERT_EQ(models_->models().size(), 2u);
  EXPECT_EQ(models_->models()[0]->model(), "alpha");
  const absl::Status twice = models_->Add(options_);
  EXPECT_EQ(twice.message(), "model beta is given twice; one server has one model of a name");
}

TEST_F(ModelRepositoryTest, IsReadyWhenAllModelsAre) {
  const absl::Status waiting = models_->Ready();
  EXPECT_TRUE(absl::IsUnavailable(waiting));
  EXPECT_EQ(waiting.message(), "model beta: waiting for the first cut");
  EXPECT_TRUE(Ask("alpha")->Wait().ok());  // all the same
  DaemonStatus status;
  models_->FillStatus(&status);
  EXPECT_EQ(status.state(), "waiting");
  EXPECT_EQ(status.detail(),
            "alpha: version 3.40, 7 steps behind; beta: waiting for the first cut");
  other_.Hold(model_, 1, 7, clock_.Now());
  EXPECT_TRUE(models_->Ready().ok());
  status.Clear();
  models_->FillStatus(&status);
  EXPECT_EQ(status.state(), "serving");
  EXPECT_EQ(status.step(), 40);
  EXPECT_EQ(status.generation(), 3u);
  EXPECT_EQ(status.rate_unit(), "requests/s");
  ASSERT_EQ(status.models_size(), 2);
  EXPECT_EQ(status.models(0).requests(), 1);
  EXPECT_EQ(status.models(1).model(), "beta");
  EXPECT_EQ(status.models(1).version().step(), 7);
}

TEST_F(ModelRepositoryTest, ModelsShareTheThreadFairly) {
  // Passes of beta take five times as long, and both have a long queue.
  auto cost = [this](absl::Duration each) {
    return std::make_shared<PuppetModel>(
        [this, each](absl::Span<const Tensor> inputs, Model::States* states) {
          clock_.Advance(each);
          return Sum(inputs, states);
        });
  };
  const auto alpha = cost(absl::Milliseconds(2)), beta = cost(absl::Milliseconds(10));
  followed_.Hold(alpha, 3, 40, clock_.Now());
  other_.Hold(beta, 1, 7, clock_.Now());
  alpha->HoldUp();
  std::vector<std::shared_ptr<Pending>> answers = {Ask("alpha")};
  alpha->AwaitPasses(1);
  std::vector<std::string> order;  // by the pool's only thread
  Mutex mu;
  options_.max_batch_size = 1;
  for (const char* name : {"gamma", "delta"}) {
    options_.model = name;
    options_.followed = name == std::string("gamma") ? &followed_ : &other_;
    options_.max_queue = 100;
    ASSERT_TRUE(models_->Add(options_).ok());
  }
  absl::BlockingCounter left(100);
  for (int i = 0; i < 50; ++i) {
    for (const char* name : {"gamma", "delta"}) {
      PredictionRequest request = Request();
      request.model = name;
      models_->Predict(std::move(request), [&, name](absl::StatusOr<Prediction> result) {
        EXPECT_TRUE(result.ok()) << result.status();
        {
          MutexLock lock(&mu);
          order.push_back(name);
        }
        left.DecrementCount();
      });
    }
  }
  alpha->LetGo();
  left.Wait();
  // When the quick one is done, the other has had about as much time: 10 passes of its 50.
  int delta = 0, gamma = 0;
  for (const std::string& name : order) {
    (name == "gamma" ? gamma : delta) += 1;
    if (gamma == 50) break;
  }
  EXPECT_GE(delta, 8);
  EXPECT_LE(delta, 12);
  EXPECT_TRUE(answers[0]->Wait().ok());
}

TEST_F(ModelRepositoryTest, MetricsTellModelsApart) {
  other_.Hold(model_, 1, 7, clock_.Now());
  EXPECT_TRUE(Ask("alpha")->Wait().ok());
  EXPECT_TRUE(Ask("beta")->Wait().ok());
  EXPECT_TRUE(Ask("beta")->Wait().ok());
  const std::string text = repository_metrics_->Text();
  EXPECT_THAT(text, HasSubstr("requests_total{code=\"OK\",model=\"alpha\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("requests_total{code=\"OK\",model=\"beta\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("codistill_model_step{model=\"beta\"} 7\n"));
}

TEST_F(ModelRepositoryTest, DrainAnswersWhatWasAccepted) {
  other_.Hold(model_, 1, 7, clock_.Now());
  model_->HoldUp();
  auto a = Ask("alpha");
  model_->AwaitPasses(1);
  auto b = Ask("beta");
  std::thread drain([&] { models_->Drain(); });
  while (!models_->models()[0]->draining()) absl::SleepFor(absl::Milliseconds(1));
  DaemonStatus status;
  models_->FillStatus(&status);
  EXPECT_EQ(status.state(), "draining");
  EXPECT_TRUE(absl::IsUnavailable(Ask("alpha")->Wait().status()));
  model_->LetGo();
  drain.join();
  EXPECT_TRUE(a->Wait().ok());
  EXPECT_TRUE(b->Wait().ok());
  EXPECT_TRUE(absl::IsUnavailable(Ask("beta")->Wait().status()));
}

}  // namespace
}  // namespace codistill
