#include "predserver/request_queue.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::ElementsAre;
using testing::UnorderedElementsAre;
using Verdict = RequestQueue::Verdict;

constexpr int64_t kBytes = 1000;

// The request's name is its model.
RequestQueue::Item Make(const std::string& client, const std::string& name, int64_t examples = 1,
                        int64_t bytes = 0) {
  auto item = std::make_unique<WaitingRequest>();
  item->request.client = client;
  item->request.model = name;
  item->plan.batch = examples;
  item->bytes = bytes;
  return item;
}

std::vector<std::string> Names(const std::vector<RequestQueue::Item>& items) {
  std::vector<std::string> names;
  for (const auto& item : items) names.push_back(item->request.model);
  return names;
}

// Takes at most `count`.
std::vector<std::string> Take(RequestQueue* queue, int count) {
  return Names(queue->Take(
      [&](const WaitingRequest&) { return count-- > 0 ? Verdict::kTake : Verdict::kStop; }));
}

TEST(RequestQueueTest, ClientsTakeTurnsAndKeepTheirOrder) {
  RequestQueue queue(100, kBytes);
  for (int i = 0; i < 5; ++i) queue.Push(Make("a", absl::StrCat("a", i)), 0);
  for (int i = 0; i < 2; ++i) queue.Push(Make("b", absl::StrCat("b", i)), 0);
  queue.Push(Make("c", "c0", 7), 0);
  EXPECT_EQ(queue.size(), 8);
  EXPECT_EQ(queue.examples(), 14);
  EXPECT_THAT(Take(&queue, 2), ElementsAre("a0", "b0"));
  queue.Push(Make("d", "d0"), 0);
  // Turns go on where they stopped, over several takes.
  EXPECT_THAT(Take(&queue, 3), ElementsAre("c0", "a1", "b1"));
  EXPECT_THAT(Take(&queue, 100), ElementsAre("d0", "a2", "a3", "a4"));
  EXPECT_EQ(queue.size(), 0);
  EXPECT_EQ(queue.examples(), 0);
  EXPECT_THAT(Take(&queue, 1), ElementsAre());
}

TEST(RequestQueueTest, WhatDoesNotFitStaysAndHoldsUpItsClientOnly) {
  RequestQueue queue(100, kBytes);
  queue.Push(Make("a", "other"), 0);
  queue.Push(Make("a", "a1"), 0);
  queue.Push(Make("b", "b0"), 0);
  queue.Push(Make("b", "b1"), 0);
  queue.Push(Make("c", "c0"), 0);
  const auto fitting = queue.Take([](const WaitingRequest& item) {
    return item.request.model == "other" ? Verdict::kSkip : Verdict::kTake;
  });
  EXPECT_THAT(Names(fitting), ElementsAre("b0", "c0", "b1"));
  queue.Push(Make("b", "b2"), 0);
  // Who was passed over comes first.
  EXPECT_THAT(Take(&queue, 3), ElementsAre("other", "b2", "a1"));
}

TEST(RequestQueueTest, WhoHasMostGivesWayInAFullQueue) {
  RequestQueue queue(4, kBytes);
  for (int i = 0; i < 4; ++i)
    EXPECT_EQ(queue.Push(Make("greedy", absl::StrCat("g", i)), 0), nullptr);
  EXPECT_FALSE(queue.HasRoom("greedy", 0, 0));
  ASSERT_TRUE(queue.HasRoom("a", 0, 0));
  EXPECT_EQ(queue.Push(Make("a", "a0"), 0)->request.model, "g3");
  ASSERT_TRUE(queue.HasRoom("a", 0, 0));
  EXPECT_EQ(queue.Push(Make("a", "a1"), 0)->request.model, "g2");
  // Two each: equals do not push each other out.
  EXPECT_FALSE(queue.HasRoom("a", 0, 0));
  EXPECT_FALSE(queue.HasRoom("greedy", 0, 0));
  EXPECT_TRUE(queue.HasRoom("b", 0, 0));
  EXPECT_EQ(queue.size(), 4);
  EXPECT_THAT(Take(&queue, 4), ElementsAre("g0", "a0", "g1", "a1"));
  EXPECT_TRUE(queue.HasRoom("greedy", 0, 0));
}

TEST(RequestQueueTest, TheDeadMakeRoom) {
  RequestQueue queue(4, kBytes);
  for (const char* name : {"x1", "y1", "x2", "y2"}) queue.Push(Make("a", name, 3), 0);
  const auto dead =
      queue.RemoveIf([](const WaitingRequest& item) { return item.request.model[0] == 'x'; });
  EXPECT_THAT(Names(dead), UnorderedElementsAre("x1", "x2"));
  EXPECT_EQ(queue.size(), 2);
  EXPECT_EQ(queue.examples(), 6);
  EXPECT_TRUE(queue.HasRoom("a", 0, 0));
  EXPECT_THAT(Take(&queue, 4), ElementsAre("y1", "y2"));
}

TEST(RequestQueueTest, BytesAreBoundedToo) {
  RequestQueue queue(100, kBytes);
  // One alone may have any number of bytes.
  EXPECT_TRUE(queue.HasRoom("a", 5000, 0));
  EXPECT_FALSE(queue.HasRoom("a", 5000, 1));
  queue.Push(Make("a", "a0", 1, 5000), 0);
  EXPECT_FALSE(queue.HasRoom("a", 1, 0));
  EXPECT_FALSE(queue.HasRoom("b", 1, 0));  // nobody has two
  EXPECT_THAT(Take(&queue, 1), ElementsAre("a0"));
  EXPECT_EQ(queue.bytes(), 0);

  for (int i = 0; i < 3; ++i) queue.Push(Make("a", absl::StrCat("a", i), 1, 300), 0);
  EXPECT_TRUE(queue.HasRoom("a", 100, 0));
  EXPECT_FALSE(queue.HasRoom("a", 101, 0));
  EXPECT_FALSE(queue.HasRoom("a", 100, 1));  // one byte waits elsewhere
  // The newest of whoever has most gives way if that is enough.
  EXPECT_FALSE(queue.HasRoom("b", 401, 0));
  ASSERT_TRUE(queue.HasRoom("b", 400, 0));
  EXPECT_EQ(queue.Push(Make("b", "b0", 1, 400), 0)->request.model, "a2");
  EXPECT_EQ(queue.bytes(), 1000);
  EXPECT_EQ(queue.RemoveIf([](const WaitingRequest&) { return true; }).size(), 3u);
  EXPECT_EQ(queue.bytes(), 0);
}

}  // namespace
}  // namespace codistill
