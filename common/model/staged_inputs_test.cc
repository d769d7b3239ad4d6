#include "common/model/staged_inputs.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

Tensor Floats(int64_t n) { return Tensor::Allocate(DT_FLOAT, {n}); }

TEST(StagedInputsTest, GivesEachCopyOnceToWhoHasItsTensor) {
  StagedInputs<int> staged(1000);
  const Tensor a = Floats(10), b = Floats(20);
  ASSERT_TRUE(staged.Reserve(a));
  EXPECT_FALSE(staged.Take(a).has_value());  // not there yet
  staged.Put(a, 1);
  ASSERT_TRUE(staged.Reserve(b));
  staged.Put(b, 2);
  EXPECT_EQ(staged.bytes(), 120);
  EXPECT_FALSE(staged.Reserve(a));  // it is there
  const Tensor same = b;
  EXPECT_EQ(staged.Take(same), 2);
  EXPECT_FALSE(staged.Take(b).has_value());
  EXPECT_EQ(staged.Take(a), 1);
  EXPECT_EQ(staged.bytes(), 0);
}

TEST(StagedInputsTest, AnotherTensorAtTheSameAddressIsNotMeant) {
  float memory[4] = {};
  StagedInputs<int> staged(1000);
  auto owner = std::make_shared<int>(0);
  const Tensor first = Tensor::Adopt(DT_FLOAT, {4}, memory, owner);
  const Tensor second = Tensor::Adopt(DT_FLOAT, {4}, memory, std::make_shared<int>(0));
  ASSERT_TRUE(staged.Reserve(first));
  staged.Put(first, 1);
  EXPECT_FALSE(staged.Take(second).has_value());
  EXPECT_EQ(staged.Take(first), 1);
}

TEST(StagedInputsTest, IsBoundedAndDropsWhatNobodyCanTakeAnyMore) {
  StagedInputs<int> staged(100);
  Tensor a = Floats(20);
  ASSERT_TRUE(staged.Reserve(a));
  staged.Put(a, 1);
  const Tensor b = Floats(10);
  EXPECT_FALSE(staged.Reserve(b));  // 80 + 40 > 100
  a = Tensor();
  ASSERT_TRUE(staged.Reserve(b));
  EXPECT_EQ(staged.bytes(), 40);
  staged.GiveUp(b);
  EXPECT_EQ(staged.bytes(), 0);
  EXPECT_FALSE(staged.Take(b).has_value());
}

}  // namespace
}  // namespace codistill
