#include "worker/teacher_endpoints.h"

#include <deque>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "common/base/retry_after.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

class TeacherEndpointsTest : public ::testing::Test {
 protected:
  // Asks one more and lets it take `latency` by itself.
  int AskOne(absl::Duration latency_of_0, absl::Duration latency_of_1) {
    const int server = endpoints_.Choose(now_);
    if (server < 0) return server;
    endpoints_.Sent(server);
    const absl::Duration latency = server == 0 ? latency_of_0 : latency_of_1;
    now_ += latency;
    endpoints_.Answered(server, latency, now_);
    return server;
  }

  TeacherEndpoints endpoints_{{"a:1", "b:2"}, 5, 42};
  absl::Time now_ = absl::FromUnixSeconds(1000);
};

TEST_F(TeacherEndpointsTest, NumbersAndNames) {
  EXPECT_EQ(endpoints_.size(), 2);
  EXPECT_EQ(endpoints_.address(1), "b:2");
  EXPECT_EQ(endpoints_.channel_index(1), 6);
}

TEST_F(TeacherEndpointsTest, FewestUnderWay) {
  std::map<int, int> asked;
  for (int i = 0; i < 6; ++i) {
    const int server = endpoints_.Choose(now_);
    endpoints_.Sent(server);
    ++asked[server];
  }
  EXPECT_EQ(asked[0], 3);
  EXPECT_EQ(asked[1], 3);
}

TEST_F(TeacherEndpointsTest, ByTurnsWhereNothingElseTells) {
  const int first = AskOne(absl::Milliseconds(10), absl::Milliseconds(10));
  EXPECT_EQ(AskOne(absl::Milliseconds(10), absl::Milliseconds(10)), 1 - first);
  EXPECT_EQ(AskOne(absl::Milliseconds(10), absl::Milliseconds(10)), first);
}

TEST_F(TeacherEndpointsTest, ThreeTimesAsSlowGetsAThirdOfTheWork) {
  AskOne(absl::Milliseconds(10), absl::Milliseconds(30));
  AskOne(absl::Milliseconds(10), absl::Milliseconds(30));
  std::map<int, int> asked;
  for (int i = 0; i < 8; ++i) {
    const int server = endpoints_.Choose(now_);
    endpoints_.Sent(server);
    ++asked[server];
  }
  EXPECT_EQ(asked[0], 6);
  EXPECT_EQ(asked[1], 2);
}

TEST_F(TeacherEndpointsTest, ASlowOneIsTriedAgainAfterAWhile) {
  int slow = 0;
  for (int i = 0; i < 100; ++i) slow += AskOne(absl::Milliseconds(10), absl::Seconds(1));
  EXPECT_EQ(slow, 1) << "in a second and a half";
  // It has recovered, and nobody knows yet.
  for (int i = 0; i < 4000; ++i) slow += AskOne(absl::Milliseconds(10), absl::Milliseconds(10));
  EXPECT_GT(slow, 10);
}

TEST_F(TeacherEndpointsTest, GivenUpTellsHowSlow) {
  for (const int expected : {0, 1}) {
    const int server = endpoints_.Choose(now_);
    EXPECT_EQ(server, expected);
    endpoints_.Sent(server);
    now_ += absl::Milliseconds(100);
    if (server == 0) {
      endpoints_.GivenUp(server, absl::Milliseconds(100), now_);
    } else {
      endpoints_.Answered(server, absl::Milliseconds(5), now_);
    }
  }
  EXPECT_EQ(AskOne(absl::Milliseconds(5), absl::Milliseconds(5)), 1);
  // Little time without an answer says nothing.
  endpoints_.Sent(1);
  endpoints_.GivenUp(1, absl::Milliseconds(1), now_);
  EXPECT_EQ(endpoints_.Choose(now_), 1);
}

TEST_F(TeacherEndpointsTest, FailuresBackOffUpToHalfASecond) {
  EXPECT_EQ(endpoints_.NextAvailable(), absl::InfinitePast());
  absl::Duration last;
  for (int i = 0; i < 12; ++i) {
    endpoints_.Sent(0);
    EXPECT_EQ(endpoints_.Failed(0, absl::UnavailableError("gone"), now_), i == 0);
    const absl::Duration pause = endpoints_.NextAvailable(/*but=*/1) - now_;
    EXPECT_GE(pause, absl::Milliseconds(30));
    EXPECT_LE(pause, absl::Milliseconds(500));
    EXPECT_EQ(endpoints_.Choose(now_), 1);
    EXPECT_EQ(endpoints_.Choose(now_, /*but=*/1), -1);
    now_ += pause;
    EXPECT_EQ(endpoints_.Choose(now_, /*but=*/1), 0);
    last = pause;
  }
  EXPECT_GE(last, absl::Milliseconds(300));
  endpoints_.Sent(0);
  endpoints_.Answered(0, absl::Milliseconds(1), now_);
  endpoints_.Sent(0);
  EXPECT_TRUE(endpoints_.Failed(0, absl::UnavailableError("gone"), now_)) << "from the beginning";
  EXPECT_LE(endpoints_.NextAvailable(1) - now_, absl::Milliseconds(50));
}

TEST_F(TeacherEndpointsTest, ABusyOneIsLeftAloneForAsLongAsItSays) {
  const absl::Status busy =
      WithRetryAfter(absl::ResourceExhaustedError("queue full"), absl::Milliseconds(700));
  for (int i = 0; i < 5; ++i) {
    endpoints_.Sent(0);
    EXPECT_FALSE(endpoints_.Failed(0, busy, now_)) << "no news of a failure";
    const absl::Duration pause = endpoints_.NextAvailable(1) - now_;
    EXPECT_GE(pause, absl::Milliseconds(700));
    EXPECT_LE(pause, absl::Milliseconds(980)) << "again and again the same";
    now_ += pause;
  }
  // Without a hint it is a failure like any other; a hint beyond belief is cut.
  endpoints_.Sent(0);
  EXPECT_TRUE(endpoints_.Failed(0, absl::ResourceExhaustedError("queue full"), now_));
  endpoints_.Sent(0);
  endpoints_.Failed(0, WithRetryAfter(absl::ResourceExhaustedError(""), absl::Hours(5)), now_);
  EXPECT_LE(endpoints_.NextAvailable(1) - now_, absl::Seconds(14));
}

TEST_F(TeacherEndpointsTest, AnAnswerToAnEarlierQuestionDoesNotEndThePause) {
  endpoints_.Sent(0);
  endpoints_.Sent(0);
  const absl::Status busy =
      WithRetryAfter(absl::ResourceExhaustedError("queue full"), absl::Milliseconds(300));
  endpoints_.Failed(0, busy, now_);
  now_ += absl::Milliseconds(5);
  endpoints_.Answered(0, absl::Milliseconds(5), now_);
  EXPECT_EQ(endpoints_.Choose(now_, /*but=*/1), -1);
  EXPECT_GE(endpoints_.NextAvailable(/*but=*/1) - now_, absl::Milliseconds(295));
  now_ += absl::Milliseconds(420);
  EXPECT_EQ(endpoints_.Choose(now_, /*but=*/1), 0);
}

// A student with steps of 5 ms that gives up each question after 10 ms. Server 0 answers within 8.
TEST_F(TeacherEndpointsTest, OneThatNeverAnswersIsAskedSeldom) {
  bool silent = true;  // server 1; else it is as fast as the other
  std::deque<std::pair<int, absl::Time>> under_way;
  const auto step = [&] {
    while (!under_way.empty()) {
      const auto [server, sent] = under_way.front();
      const bool answers = server == 0 || !silent;
      const absl::Duration latency = absl::Milliseconds(answers ? 8 : 10);
      if (now_ - sent < latency) break;
      if (answers) {
        endpoints_.Answered(server, latency, sent + latency);
      } else {
        endpoints_.GivenUp(server, latency, sent + latency);
      }
      under_way.pop_front();
    }
    const int server = endpoints_.Choose(now_);
    endpoints_.Sent(server);
    under_way.emplace_back(server, now_);
    now_ += absl::Milliseconds(5);
    return server;
  };
  int asked = 0;
  for (int i = 0; i < 6000; ++i) asked += step();
  EXPECT_LE(asked, 60) << "of 6000, in 30 seconds";
  EXPECT_GE(asked, 5) << "it might have come back";
  // It has, and is heard of again within a few seconds.
  silent = false;
  for (int i = 0; i < 4000; ++i) step();
  asked = 0;
  for (int i = 0; i < 100; ++i) asked += step();
  EXPECT_GE(asked, 30);
}

TEST_F(TeacherEndpointsTest, AloneThereIsNoOther) {
  TeacherEndpoints one({"a:1"}, 0, 1);
  EXPECT_EQ(one.Choose(now_, 0), -1);
  EXPECT_EQ(one.NextAvailable(0), absl::InfiniteFuture());
}

}  // namespace
}  // namespace codistill
