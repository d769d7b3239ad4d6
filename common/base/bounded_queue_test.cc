#include "common/base/bounded_queue.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

absl::Time Soon() { return absl::Now() + absl::Milliseconds(10); }
absl::Time Later() { return absl::Now() + absl::Seconds(30); }

TEST(BoundedQueueTest, KeepsOrderAndRefusesBeyondCapacity) {
  BoundedQueue<int> queue(2);
  EXPECT_TRUE(queue.TryPush(1).ok());
  EXPECT_TRUE(queue.Push(2, Soon()).ok());
  EXPECT_EQ(queue.TryPush(3).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(queue.Push(3, Soon()).code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(queue.size(), 2u);
  EXPECT_EQ(queue.Pop(Soon()).value(), 1);
  EXPECT_EQ(queue.Pop(Soon()).value(), 2);
  EXPECT_EQ(queue.Pop(Soon()).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(queue.Pop(absl::InfinitePast()).status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(BoundedQueueTest, RefusedItemIsNotMovedFrom) {
  BoundedQueue<std::unique_ptr<int>> queue(1);
  ASSERT_TRUE(queue.TryPush(std::make_unique<int>(1)).ok());
  auto item = std::make_unique<int>(2);
  EXPECT_FALSE(queue.TryPush(std::move(item)).ok());
  ASSERT_NE(item, nullptr);
  EXPECT_FALSE(queue.Push(std::move(item), Soon()).ok());
  ASSERT_NE(item, nullptr);
  queue.Close();
  EXPECT_EQ(queue.TryPush(std::move(item)).code(), absl::StatusCode::kCancelled);
  ASSERT_NE(item, nullptr);
}

TEST(BoundedQueueTest, CloseDrainsThenCancels) {
  BoundedQueue<int> queue(4);
  ASSERT_TRUE(queue.TryPush(7).ok());
  queue.Close();
  queue.Close();
  EXPECT_TRUE(queue.closed());
  EXPECT_EQ(queue.Push(8, Later()).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(queue.Pop(Later()).value(), 7);
  EXPECT_EQ(queue.Pop(Later()).status().code(), absl::StatusCode::kCancelled);
}

TEST(BoundedQueueTest, CloseWakesBlockedProducersAndConsumers) {
  BoundedQueue<int> full(1), empty(1);
  ASSERT_TRUE(full.TryPush(1).ok());
  std::thread producer(
      [&] { EXPECT_EQ(full.Push(2, Later()).code(), absl::StatusCode::kCancelled); });
  std::thread consumer(
      [&] { EXPECT_EQ(empty.Pop(Later()).status().code(), absl::StatusCode::kCancelled); });
  full.Close();
  empty.Close();
  producer.join();
  consumer.join();
}

TEST(BoundedQueueTest, ManyProducersAndConsumersLoseNothing) {
  constexpr int kThreads = 4, kItems = 5000;
  BoundedQueue<int> queue(3);
  std::atomic<int64_t> sum{0};
  std::atomic<int> count{0};
  std::vector<std::thread> producers, consumers;
  for (int t = 0; t < kThreads; ++t) {
    producers.emplace_back([&] {
      for (int i = 1; i <= kItems; ++i) ASSERT_TRUE(queue.Push(int{i}, Later()).ok());
    });
    consumers.emplace_back([&] {
      while (true) {
        absl::StatusOr<int> item = queue.Pop(Later());
        if (!item.ok()) {
          EXPECT_EQ(item.status().code(), absl::StatusCode::kCancelled);
          return;
        }
        EXPECT_LE(queue.size(), queue.capacity());
        sum += *item;
        ++count;
      }
    });
  }
  for (std::thread& producer : producers) producer.join();
  queue.Close();
  for (std::thread& consumer : consumers) consumer.join();
  EXPECT_EQ(count, kThreads * kItems);
  EXPECT_EQ(sum, int64_t{kThreads} * kItems * (kItems + 1) / 2);
}

}  // namespace
}  // namespace codistill
