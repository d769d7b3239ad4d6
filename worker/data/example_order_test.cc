#include "worker/data/example_order.h"

#include <algorithm>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

ExampleOrder Order(int group, int num_groups, Partition partition, int64_t size,
                   uint64_t seed = 1) {
  ExampleOrder::Options options;
  options.seed = seed;
  options.group = group;
  options.num_groups = num_groups;
  options.partition = partition;
  options.size = size;
  return ExampleOrder(options);
}

std::vector<int64_t> Indices(const std::vector<ExampleRef>& refs) {
  std::vector<int64_t> indices;
  for (const ExampleRef& ref : refs) indices.push_back(ref.index);
  return indices;
}

TEST(ExampleOrder, VisitsEachExampleOnceAnEpoch) {
  for (const int64_t size : {1, 2, 7, 100, 1000}) {
    const ExampleOrder order = Order(0, 1, SAME, size);
    EXPECT_EQ(order.epoch_size(), size);
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      const std::vector<ExampleRef> refs = order.Range(epoch * size, size);
      std::set<int64_t> seen;
      for (const ExampleRef& ref : refs) {
        EXPECT_EQ(ref.epoch, epoch);
        EXPECT_GE(ref.index, 0);
        EXPECT_LT(ref.index, size);
        seen.insert(ref.index);
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()), size);
    }
  }
}

TEST(ExampleOrder, DisjointGroupsShareNoExampleAndLeaveNoneOut) {
  constexpr int kGroups = 3;
  constexpr int64_t kSize = 100;
  std::set<int64_t> seen;
  int64_t total = 0;
  for (int group = 0; group < kGroups; ++group) {
    const ExampleOrder order = Order(group, kGroups, DISJOINT, kSize);
    total += order.epoch_size();
    for (const ExampleRef& ref : order.Range(0, order.epoch_size())) {
      EXPECT_EQ(ref.index % kGroups, group);
      EXPECT_LT(ref.index, kSize);
      EXPECT_TRUE(seen.insert(ref.index).second);
    }
  }
  EXPECT_EQ(total, kSize);
  EXPECT_EQ(static_cast<int64_t>(seen.size()), kSize);
}

TEST(ExampleOrder, IsWithoutState) {
  const ExampleOrder order = Order(1, 2, DISJOINT, 37);
  const std::vector<ExampleRef> all = order.Range(0, 100);
  for (int first = 0; first < 90; first += 7) {
    const std::vector<ExampleRef> part = order.Range(first, 10);
    EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first));
  }
  EXPECT_EQ(order.At(99), all[99]);
  // Far into a long run, beyond 32 bits.
  const uint64_t far = uint64_t{37} << 40;
  EXPECT_EQ(order.At(far + 5), order.Range(far, 6)[5]);
}

TEST(ExampleOrder, DiffersBetweenEpochsGroupsAndSeeds) {
  constexpr int64_t kSize = 1000;
  const std::vector<int64_t> first = Indices(Order(0, 2, SAME, kSize).Range(0, kSize));
  EXPECT_NE(first, Indices(Order(0, 2, SAME, kSize).Range(kSize, kSize)));
  EXPECT_NE(first, Indices(Order(1, 2, SAME, kSize).Range(0, kSize)));
  EXPECT_NE(first, Indices(Order(0, 2, SAME, kSize, 2).Range(0, kSize)));
  EXPECT_EQ(first, Indices(Order(0, 2, SAME, kSize).Range(0, kSize)));
  EXPECT_FALSE(std::is_sorted(first.begin(), first.end()));
}

// Resumed jobs rely on these values.
TEST(ExampleOrder, DoesNotChange) {
  EXPECT_EQ(Indices(Order(1, 2, SAME, 10, 3).Range(0, 10)),
            (std::vector<int64_t>{6, 9, 1, 0, 8, 2, 7, 5, 3, 4}));
}

TEST(ExampleOrder, SequentialDataKeepTheirOrder) {
  ExampleOrder::Options options;
  options.size = 5;
  options.sequential = true;
  options.group = 1;
  options.num_groups = 2;
  options.partition = DISJOINT;  // was cut when it was read
  const ExampleOrder order(options);
  EXPECT_EQ(order.epoch_size(), 5);
  EXPECT_EQ(Indices(order.Range(3, 5)), (std::vector<int64_t>{3, 4, 0, 1, 2}));
  EXPECT_EQ(order.At(4).epoch, 0);
  EXPECT_EQ(order.At(5).epoch, 1);
}

}  // namespace
}  // namespace codistill
