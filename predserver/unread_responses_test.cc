#include "predserver/unread_responses.h"

#include "common/base/retry_after.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using Account = UnreadResponses::Account;

TEST(UnreadResponsesTest, RefusesAtTheLimitUntilSomethingIsRead) {
  UnreadResponses unread(100);
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

TEST(UnreadResponsesTest, AccountsGoWithThoseWhoHaveThem) {
  UnreadResponses unread(100);
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
