#ifndef CODISTILL_PREDSERVER_PREDICTOR_FIXTURE_H_
#define CODISTILL_PREDSERVER_PREDICTOR_FIXTURE_H_

#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "common/base/simulated_clock.h"
#include "common/metrics/metrics.h"
#include "common/model/testing/puppet_model.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "predserver/compute_pool.h"
#include "predserver/predictor.h"

// For tests: a predictor of a model that does as it is told, on a clock that stands still.
namespace codistill {

// logits = [sum of x, h + 1]; h becomes h + 1.
inline absl::StatusOr<Model::Logits> Sum(absl::Span<const Tensor> inputs, Model::States* states) {
  const int64_t batch = inputs[0].shape()[0];
  Tensor h = Tensor::Zeros(DT_FLOAT, {batch, 1});
  Tensor logits = Tensor::Allocate(DT_FLOAT, {batch, 2});
  for (int64_t i = 0; i < batch; ++i) {
    const auto x = inputs[0].As<float>().subspan(i * 2, 2);
    if (x[0] == 666) return absl::InvalidArgumentError("forward() failed on this batch");
    if (!(*states)[0].empty()) h.As<float>()[i] = (*states)[0].As<float>()[i];
    h.As<float>()[i] += 1;
    logits.As<float>()[i * 2] = x[0] + x[1];
    logits.As<float>()[i * 2 + 1] = h.As<float>()[i];
  }
  (*states)[0] = h;
  return Model::Logits{logits, batch};
}

class PredictorTest : public testing::Test {
 protected:
  PredictorTest() : model_(std::make_shared<PuppetModel>(Sum)) {
    options_.model = "alpha";
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
        "inputs { name: 'x' shape: 2 } states { name: 'h' shape: [-1, 1] } num_outputs: 2",
        &options_.config));
    options_.followed = &followed_;
    options_.max_queue = 2;
    options_.max_batch_delay = absl::ZeroDuration();
    metrics_ = Metrics::Create({});
    options_.metrics = metrics_.get();
    options_.clock = &clock_;
    ComputePool::Options pool;
    pool.clock = &clock_;
    pool_ = *ComputePool::Create(pool);
    options_.pool = pool_.get();
    Make();
    followed_.Hold(model_, 3, 40, clock_.Now());
    followed_.SetGroupStep(3, 47);
  }

  void Make() {
    predictor_.reset();
    auto predictor = Predictor::Create(options_);
    EXPECT_TRUE(predictor.ok()) << predictor.status();
    predictor_ = *std::move(predictor);
  }

  static PredictionRequest Request(const std::vector<float>& x = {1, 2}) {
    const auto bytes = std::make_shared<std::vector<float>>(x);
    PredictionRequest request;
    request.model = "alpha";
    request.owner = bytes;
    request.inputs.push_back(
        {"x",
         "FP32",
         {static_cast<int64_t>(x.size() / 2), 2},
         {{reinterpret_cast<const uint8_t*>(bytes->data()), bytes->size() * sizeof(float)}}});
    return request;
  }

  // An answer that is on its way.
  struct Pending {
    absl::Notification done;
    std::optional<absl::StatusOr<Prediction>> result;
    int place = 0;  // among all answers of the test
    const absl::StatusOr<Prediction>& Wait() {
      done.WaitForNotification();
      return *result;
    }
  };
  std::shared_ptr<Pending> Start(PredictionRequest request) {
    auto pending = std::make_shared<Pending>();
    predictor_->Predict(std::move(request), [this, pending](absl::StatusOr<Prediction> result) {
      EXPECT_FALSE(pending->done.HasBeenNotified()) << "answered twice";
      pending->result = std::move(result);
      pending->place = answers_++;
      pending->done.Notify();
    });
    return pending;
  }
  absl::StatusOr<Prediction> Predict(PredictionRequest request) {
    return Start(std::move(request))->Wait();
  }

  // With limits of its own, on so many threads.
  void MakeAnew(int threads = 1) {
    predictor_.reset();
    ComputePool::Options pool;
    pool.threads = threads;
    pool.clock = &clock_;
    pool_ = *ComputePool::Create(pool);
    options_.pool = pool_.get();
    options_.metrics = nullptr;
    Make();
  }

  SimulatedClock clock_;
  std::atomic<int> answers_{0};
  PuppetFollowedModel followed_;
  std::shared_ptr<PuppetModel> model_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<ComputePool> pool_;
  Predictor::Options options_;
  std::unique_ptr<Predictor> predictor_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTOR_FIXTURE_H_
