#include "common/config/parameter_groups.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Patterns, Match) {
  EXPECT_TRUE(MatchesPattern("", ""));
  EXPECT_TRUE(MatchesPattern("*", ""));
  EXPECT_TRUE(MatchesPattern("*", "layers.0.weight"));
  EXPECT_TRUE(MatchesPattern("layers.?.weight", "layers.0.weight"));
  EXPECT_FALSE(MatchesPattern("layers.?.weight", "layers.10.weight"));
  EXPECT_FALSE(MatchesPattern("layers", "layers.0.weight"));  // the whole name
  EXPECT_TRUE(MatchesPattern("*.bias", "a.b.bias"));
  EXPECT_FALSE(MatchesPattern("*.bias", "a.b.bias2"));
  EXPECT_TRUE(MatchesPattern("*bn*.weight", "stage.bn1.sub.weight"));
  EXPECT_TRUE(MatchesPattern("a*b*c", "a-b-b-c-c"));
  EXPECT_FALSE(MatchesPattern("a*b*c", "a-c-b"));
  EXPECT_FALSE(MatchesPattern("?", ""));
  EXPECT_FALSE(MatchesPattern("layersX0", "layers.0"));  // a dot is a dot
}

TEST(Patterns, EndOnHostileInput) {
  EXPECT_FALSE(MatchesPattern(std::string(2000, '*') + "b", std::string(5000, 'a')));
  std::string many;
  for (int i = 0; i < 200; ++i) many += "*a";
  EXPECT_FALSE(MatchesPattern(many + "b", std::string(5000, 'a')));
}

class ParameterGroupsTest : public testing::Test {
 protected:
  ParameterGroupsTest() {
    Add("body.0.weight", {8, 4}, TensorSpec::PARAMETER);
    Add("body.0.bias", {8}, TensorSpec::PARAMETER);
    Add("body.1.running_mean", {8}, TensorSpec::BUFFER);
    Add("head.weight", {2, 8}, TensorSpec::PARAMETER);
  }
  void Add(const std::string& name, std::vector<int64_t> shape, TensorSpec::Role role) {
    TensorSpec* spec = tensors_.add_tensors();
    spec->set_name(name);
    spec->set_dtype(DT_FLOAT);
    spec->set_role(role);
    for (const int64_t dimension : shape) spec->add_shape(dimension);
  }
  ParameterGroup* Group(const std::string& pattern) {
    ParameterGroup* group = optimizer_.add_parameter_groups();
    group->set_pattern(pattern);
    return group;
  }
  std::vector<ParameterPolicy> Resolve() {
    return ResolveParameterGroups(optimizer_, tensors_.tensors()).value();
  }
  TensorList tensors_;
  OptimizerConfig optimizer_;
};

TEST_F(ParameterGroupsTest, ByDefaultOnlyMatricesDecay) {
  const auto policies = Resolve();
  ASSERT_EQ(policies.size(), 4u);
  EXPECT_TRUE(policies[0].trained);
  EXPECT_EQ(policies[0].weight_decay_multiplier, 1);
  EXPECT_EQ(policies[0].learning_rate_multiplier, 1);
  EXPECT_TRUE(policies[1].trained);
  EXPECT_EQ(policies[1].weight_decay_multiplier, 0);
  EXPECT_FALSE(policies[2].trained);  // a buffer
}

TEST_F(ParameterGroupsTest, TheFirstMatchHolds) {
  ParameterGroup* group = Group("body.*.bias");
  group->set_weight_decay_multiplier(0.5f);
  Group("body.*")->set_frozen(true);
  group = Group("*");
  group->set_learning_rate_multiplier(10);
  const auto policies = Resolve();
  EXPECT_FALSE(policies[0].trained);
  EXPECT_TRUE(policies[1].trained);
  EXPECT_EQ(policies[1].weight_decay_multiplier, 0.5);
  EXPECT_EQ(policies[1].learning_rate_multiplier, 1);
  EXPECT_TRUE(policies[3].trained);
  EXPECT_EQ(policies[3].learning_rate_multiplier, 10);
  EXPECT_EQ(policies[3].weight_decay_multiplier, 1);  // left out: by rank
}

TEST_F(ParameterGroupsTest, FrozenParametersAreInTheMap) {
  ShardMap map;
  *map.mutable_tensors() = tensors_.tensors();
  ASSERT_TRUE(MarkFrozen(optimizer_, &map).ok());
  EXPECT_EQ(map.frozen_size(), 0);
  Group("*bias")->set_frozen(true);
  ASSERT_TRUE(MarkFrozen(optimizer_, &map).ok());
  ASSERT_TRUE(MarkFrozen(optimizer_, &map).ok());
  EXPECT_THAT(map.frozen(), testing::ElementsAre(1));
  Group("none");
  EXPECT_FALSE(MarkFrozen(optimizer_, &map).ok());
}

TEST_F(ParameterGroupsTest, PatternsThatMatchNothingAreNamed) {
  Group("body.*");
  Group("heads.*");
  Group("body.0.weight");        // behind a wider one, but not misspelt
  Group("body.1.running_mean");  // a buffer is no parameter
  const absl::Status status = ResolveParameterGroups(optimizer_, tensors_.tensors()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(status.message()),
      HasSubstr("parameter_groups[1].pattern: matches no parameter of the model (heads.*)"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("parameter_groups[3].pattern"));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("parameter_groups[0]")));
  EXPECT_THAT(std::string(status.message()), Not(HasSubstr("parameter_groups[2]")));
}

}  // namespace
}  // namespace codistill
