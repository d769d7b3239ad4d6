#include "worker/recurrent_state.h"

#include <cstdint>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(RecurrentStateTest, OtherBlobsAreRefused) {
  ModelConfig config;
  auto* state = config.add_states();
  state->set_name("h");
  for (int64_t dimension : {2, -1, 3}) state->add_shape(dimension);
  RecurrentStateAfter after;
  after.step = 12;
  after.states = {Tensor::Zeros(DT_FLOAT, {2, 4, 3})};
  after.states[0].As<float>()[23] = 5;
  const std::string blob = EncodeWorkerState(config, after);
  auto back = DecodeWorkerState(config, blob);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->step, 12);
  EXPECT_THAT(back->states[0].shape(), ElementsAre(2, 4, 3));
  EXPECT_EQ(back->states[0].As<float>()[23], 5);
  EXPECT_EQ(back->For(13, false).size(), 1u);
  EXPECT_TRUE(back->For(13, true).empty());
  EXPECT_TRUE(back->For(14, false).empty());

  EXPECT_FALSE(DecodeWorkerState(config, "nonsense").ok());
  EXPECT_FALSE(DecodeWorkerState(config, blob.substr(0, blob.size() - 1)).ok());
  config.mutable_states(0)->set_shape(2, 4);
  EXPECT_THAT(DecodeWorkerState(config, blob).status().ToString(), HasSubstr("\"h\""));
  config.clear_states();
  EXPECT_FALSE(DecodeWorkerState(config, blob).ok());
}

}  // namespace
}  // namespace codistill
