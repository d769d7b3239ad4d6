#include "predserver/unread_responses.h"

#include <memory>
#include <string>
#include <vector>

#include "common/base/retry_after.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using Account = UnreadResponses::Account;

TEST(UnreadResponsesTest, RefusesAtTheLimitUntilSomethingIsRead) {
  UnreadResponses unread(100, 1000);
  const std::shared_ptr<Account> one = unread.Find("one");
  EXPECT_TRUE(one->Check().ok());
  std::shared_ptr<const void> a = Account::Hold(one, 60);
  EXPECT_TRUE(one->Check().ok());
  const std::shared_ptr<const void> b = Account::Hold(unread.Find("one"), 40);
  EXPECT_TRUE(one->full());
  EXPECT_EQ(one->bytes(), 100);
  const absl::Status refused = one->Check();
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  EXPECT_TRUE(RetryAfter(refused).has_value());
  // Others do not suffer.
  EXPECT_TRUE(unread.Find("two")->Check().ok());
  std::shared_ptr<const void> copy = a;
  a.reset();
  EXPECT_TRUE(one->full());
  copy.reset();
  EXPECT_TRUE(one->Check().ok());
  EXPECT_EQ(one->bytes(), 40);
}

TEST(UnreadResponsesTest, ManyWhoReadNothingLeaveAShareForOthers) {
  UnreadResponses unread(100, 300);
  std::vector<std::shared_ptr<const void>> unread_bytes;
  size_t total = 0;
  // Each takes what it is given.
  for (int i = 0; i < 50; ++i) {
    const std::shared_ptr<Account> client = unread.Find(std::to_string(i));
    while (client->Check().ok()) {
      unread_bytes.push_back(Account::Hold(client, 1));
      ++total;
    }
    EXPECT_EQ(client->bytes(), i < 2 ? 100u : client->bytes());
    EXPECT_LE(total, 300u);
  }
  EXPECT_GT(total, 250u);
  EXPECT_TRUE(absl::IsResourceExhausted(unread.Find("0")->Check()));
  const bool room = unread.Find("new")->Check().ok();
  EXPECT_EQ(room, total < 300);
  unread_bytes.clear();
  EXPECT_TRUE(unread.Find("new")->Check().ok());
}

TEST(UnreadResponsesTest, APassMayAnswerMoreThanTheLimitButLeavesRoom) {
  UnreadResponses unread(100, 400);
  const std::shared_ptr<Account> one = unread.Find("one");
  std::vector<std::shared_ptr<const void>> held;
  while (one->CheckRoomFor(50).ok()) held.push_back(Account::Hold(one, 50));
  EXPECT_EQ(one->bytes(), 200u);  // as much as is left
  EXPECT_TRUE(absl::IsResourceExhausted(one->CheckRoomFor(50)));
  const std::shared_ptr<Account> other = unread.Find("other");
  EXPECT_TRUE(other->Check().ok());
  EXPECT_TRUE(other->CheckRoomFor(1000).ok());  // its first
}

TEST(UnreadResponsesTest, AccountsGoWithThoseWhoHaveThem) {
  UnreadResponses unread(100, 1000);
  std::shared_ptr<const void> held = Account::Hold(unread.Find("one"), 10);
  EXPECT_EQ(unread.Find("one")->bytes(), 10);
  for (int i = 0; i < 1000; ++i) unread.Find("client " + std::to_string(i));
  EXPECT_EQ(unread.size(), 1);
  held.reset();
  EXPECT_EQ(unread.Find("one")->bytes(), 0);
  EXPECT_EQ(unread.size(), 0);
}

}  // namespace
}  // namespace codistill
