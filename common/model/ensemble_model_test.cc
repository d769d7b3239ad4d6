#include "common/model/ensemble_model.h"

#include <cmath>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/model/testing/puppet_model.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

// Answers the same row to every example.
std::shared_ptr<const Model> Says(std::vector<float> row, int64_t extra_rows = 0) {
  return std::make_shared<PuppetModel>(
      [row, extra_rows](absl::Span<const Tensor> inputs,
                        Model::States*) -> absl::StatusOr<Model::Logits> {
        Model::Logits logits;
        logits.rows = inputs[0].shape()[0] + extra_rows;
        const auto columns = static_cast<int64_t>(row.size());
        logits.values = Tensor::Allocate(DT_FLOAT, {logits.rows, columns});
        for (int64_t i = 0; i < logits.rows * columns; ++i) {
          logits.values.As<float>()[i] = row[i % columns];
        }
        return logits;
      });
}

class EnsembleModelTest : public testing::Test {
 protected:
  EnsembleModelTest()
      : north_(std::make_shared<PuppetFollowedModel>()),
        south_(std::make_shared<PuppetFollowedModel>()) {
    options_.name = "both";
    options_.model.set_num_outputs(2);
    options_.members = {{"north", north_}, {"south", south_}};
  }

  void Create() {
    auto ensemble = CreateEnsemble(options_);
    ASSERT_TRUE(ensemble.ok()) << ensemble.status();
    ensemble_ = *std::move(ensemble);
  }
  absl::StatusOr<Model::Logits> Predict(int64_t rows = 1) const {
    const auto snapshot = ensemble_->Get();
    if (!snapshot.ok()) return snapshot.status();
    return (*snapshot)->model->Predict({Tensor::Zeros(DT_FLOAT, {rows, 2})}, nullptr);
  }
  std::vector<float> Answer(int64_t rows = 1) const {
    const auto logits = Predict(rows);
    EXPECT_TRUE(logits.ok()) << logits.status();
    if (!logits.ok()) return {};
    EXPECT_EQ(logits->rows, rows);
    const auto values = logits->values.As<float>();
    return std::vector<float>(values.begin(), values.end());
  }

  const std::shared_ptr<PuppetFollowedModel> north_, south_;
  EnsembleOptions options_;
  std::unique_ptr<FollowedModel> ensemble_;
};

TEST_F(EnsembleModelTest, AveragesWhatTheLossMeans) {
  // Probabilities (1/4, 3/4) and (9/10, 1/10).
  north_->Hold(Says({0, std::log(3.0f)}), 1, 10);
  south_->Hold(Says({std::log(9.0f), 0}), 1, 10);
  Create();
  std::vector<float> out = Answer(3);
  ASSERT_EQ(out.size(), 6u);
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(std::exp(out[i]), i % 2 == 0 ? 0.575 : 0.425, 1e-6);

  options_.model.set_label_loss(SIGMOID_CROSS_ENTROPY);
  Create();
  EXPECT_NEAR(Answer()[0], std::log(7.0 / 3), 1e-6);
  options_.model.set_label_loss(SQUARED_ERROR);
  Create();
  EXPECT_FLOAT_EQ(Answer()[0], std::log(9.0f) / 2);
  options_.model.set_label_loss(SOFTMAX_CROSS_ENTROPY);
  options_.average = CodistillationConfig::LOGITS;
  Create();
  EXPECT_FLOAT_EQ(Answer()[0], std::log(9.0f) / 2);
  EXPECT_FLOAT_EQ(Answer()[1], std::log(3.0f) / 2);
}

TEST_F(EnsembleModelTest, NamesTheMemberThatHasNothing) {
  north_->Hold(Says({0, 0}), 1, 10);
  Create();
  const absl::Status status = ensemble_->Get().status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("ensemble both: member south: "));
  EXPECT_TRUE(ensemble_->Held().empty());
  south_->Hold(Says({0, 0}, 1), 1, 10);
  EXPECT_THAT(std::string(Predict().status().message()),
              HasSubstr("ensemble both: member south gave logits [2, 2]; those of the others are "
                        "[1, 2]"));
}

TEST_F(EnsembleModelTest, AVersionIsOneCombination) {
  const absl::Time early = absl::Now() - absl::Seconds(50);
  north_->Hold(Says({1, 0}), 1, 100, early);
  south_->Hold(Says({3, 0}), 2, 40);
  options_.average = CodistillationConfig::LOGITS;
  Create();
  const auto first = *ensemble_->Get();
  EXPECT_EQ(first->version.generation(), 3u);
  EXPECT_EQ(first->version.step(), 140);
  EXPECT_EQ(first->loaded_at, early);
  EXPECT_EQ(*ensemble_->Get(), first) << "the same combination is the same version";
  EXPECT_EQ(ensemble_->counters().swaps, 1);

  south_->Hold(Says({5, 0}), 2, 60);
  const auto second = *ensemble_->WaitForNewer(first->version, absl::InfiniteFuture());
  EXPECT_EQ(second->version.step(), 160);
  EXPECT_EQ(ensemble_->counters().swaps, 2);
  // What is held goes on saying what it said.
  const auto answer = [](const auto& snapshot) {
    return snapshot->model->Predict({Tensor::Zeros(DT_FLOAT, {1, 2})}, nullptr)
        ->values.template As<float>()[0];
  };
  EXPECT_EQ(answer(first), 2);
  EXPECT_EQ(answer(second), 3);
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      ensemble_->WaitForNewer(second->version, absl::Now() + absl::Milliseconds(30)).status()));
}

TEST_F(EnsembleModelTest, IsAsStaleAsItsStalestMember) {
  north_->Hold(Says({0, 0}), 1, 100);
  south_->Hold(Says({0, 0}), 1, 40);
  north_->SetGroupStep(1, 105);
  south_->SetGroupStep(1, 70);
  Create();
  EXPECT_EQ(ensemble_->group_step() - (*ensemble_->Get())->version.step(), 30);
  EXPECT_EQ(ensemble_->group_state().version().step(), 170);
  south_->Hold(Says({0, 0}), 1, 70);
  EXPECT_EQ(ensemble_->group_step() - (*ensemble_->Get())->version.step(), 5);
}

TEST_F(EnsembleModelTest, RefusesRecurrentMembersAndNone) {
  options_.model.add_states()->set_name("h");
  EXPECT_THAT(std::string(CreateEnsemble(options_).status().message()),
              HasSubstr("ensemble both: its members have recurrent state (h)"));
  options_.model.clear_states();
  options_.members.clear();
  EXPECT_THAT(std::string(CreateEnsemble(options_).status().message()), HasSubstr("no members"));
}

TEST_F(EnsembleModelTest, NeverGoesBackWhileMembersMoveOn) {
  north_->Hold(Says({0, 0}), 1, 0);
  south_->Hold(Says({0, 0}), 1, 0);
  Create();
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([this] {
      int64_t seen = 0;
      while (seen < 400) {
        const int64_t step = (*ensemble_->Get())->version.step();
        ASSERT_GE(step, seen);
        seen = step;
      }
    });
  }
  for (int64_t step = 1; step <= 200; ++step) {
    north_->Hold(Says({0, 0}), 1, step);
    south_->Hold(Says({0, 0}), 1, step);
  }
  for (std::thread& reader : readers) reader.join();
}

}  // namespace
}  // namespace codistill
