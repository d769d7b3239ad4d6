#include "common/model/inputs.h"

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

ModelConfig Config() {
  ModelConfig config;
  ModelInput* image = config.add_inputs();
  image->set_name("image");
  image->add_shape(3);
  image->add_shape(8);
  ModelInput* category = config.add_inputs();
  category->set_name("category");
  category->set_dtype(DT_INT64);
  RecurrentState* state = config.add_states();
  state->set_name("h");
  for (int64_t size : {2, -1, 5}) state->add_shape(size);
  config.set_num_outputs(4);
  return config;
}

std::string InputError(Tensor image, Tensor category) {
  const auto result = CheckInputs(Config(), {std::move(image), std::move(category)});
  if (result.ok()) return "";
  EXPECT_TRUE(absl::IsInvalidArgument(result.status()));
  return std::string(result.status().message());
}

TEST(InputsTest, GivesTheBatchSize) {
  const auto batch =
      CheckInputs(Config(), {Tensor::Zeros(DT_FLOAT, {7, 3, 8}), Tensor::Zeros(DT_INT64, {7})});
  ASSERT_TRUE(batch.ok()) << batch.status();
  EXPECT_EQ(*batch, 7);
}

TEST(InputsTest, NamesWhatIsWrong) {
  EXPECT_EQ(InputError(Tensor::Zeros(DT_FLOAT, {7, 3, 9}), Tensor::Zeros(DT_INT64, {7})),
            "input image has shape [7, 3, 9]; it must be [B, 3, 8] with B >= 1");
  EXPECT_EQ(InputError(Tensor::Zeros(DT_FLOAT, {0, 3, 8}), Tensor::Zeros(DT_INT64, {0})),
            "input image has shape [0, 3, 8]; it must be [B, 3, 8] with B >= 1");
  EXPECT_EQ(InputError(Tensor::Zeros(DT_FLOAT, {7, 3, 8}), Tensor::Zeros(DT_FLOAT, {7})),
            "input category is FP32; it must be INT64");
  EXPECT_EQ(InputError(Tensor::Zeros(DT_FLOAT, {7, 3, 8}), Tensor::Zeros(DT_INT64, {6})),
            "input category has 6 examples where input image has 7");
  EXPECT_EQ(CheckInputs(Config(), {Tensor::Zeros(DT_FLOAT, {7, 3, 8})}).status().message(),
            "the model takes 2 inputs, got 1");
}

TEST(InputsTest, StateShapeHasTheBatchInPlace) {
  EXPECT_THAT(StateShape(Config().states(0), 9), ElementsAre(2, 9, 5));
}

TEST(InputsTest, StatesMayBeAbsentButNotOfAnotherShape) {
  EXPECT_TRUE(CheckStates(Config(), {}, 9).ok());
  EXPECT_TRUE(CheckStates(Config(), {Tensor()}, 9).ok());
  EXPECT_TRUE(CheckStates(Config(), {Tensor::Zeros(DT_FLOAT, {2, 9, 5})}, 9).ok());
  EXPECT_EQ(CheckStates(Config(), {Tensor::Zeros(DT_FLOAT, {2, 8, 5})}, 9).message(),
            "state h is FP32 [2, 8, 5]; it must be FP32 [2, 9, 5]");
  EXPECT_FALSE(CheckStates(Config(), {Tensor(), Tensor()}, 9).ok());
}

TEST(InputsTest, ChecksTheConfig) {
  EXPECT_TRUE(CheckModelConfig(Config()).ok());
  ModelConfig bad = Config();
  bad.clear_num_outputs();
  bad.mutable_inputs(1)->set_name("image");
  bad.mutable_states(0)->set_shape(1, 4);
  const absl::Status status = CheckModelConfig(bad);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.num_outputs: 0"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("name image is used twice"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("state h must have exactly one -1"));
}

}  // namespace
}  // namespace codistill
