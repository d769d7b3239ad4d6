#include "common/base/retry_after.h"

#include "absl/strings/cord.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(RetryAfterTest, ComesBackAsItWasGiven) {
  for (const absl::Duration delay :
       {absl::ZeroDuration(), absl::Milliseconds(100), absl::Seconds(127), absl::Seconds(300),
        absl::Nanoseconds(1), absl::Seconds(5) + absl::Nanoseconds(999999999)}) {
    const absl::Status status = WithRetryAfter(absl::ResourceExhaustedError("full"), delay);
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(status.message(), "full");
    EXPECT_EQ(RetryAfter(status), delay);
  }
}

TEST(RetryAfterTest, IsWhatGoogleRpcRetryInfoIs) {
  const absl::Status status = WithRetryAfter(absl::ResourceExhaustedError(""), absl::Seconds(1.5));
  // retry_delay { seconds: 1 nanos: 500000000 }
  EXPECT_EQ(status.GetPayload("type.googleapis.com/google.rpc.RetryInfo"),
            absl::Cord(absl::string_view("\x0a\x08\x08\x01\x10\x80\xca\xb5\xee\x01", 10)));
}

TEST(RetryAfterTest, NothingComesOfNothing) {
  EXPECT_TRUE(WithRetryAfter(absl::OkStatus(), absl::Seconds(1)).ok());
  EXPECT_FALSE(RetryAfter(absl::OkStatus()).has_value());
  absl::Status status = absl::ResourceExhaustedError("full");
  EXPECT_FALSE(RetryAfter(status).has_value());
  for (const char* bytes :
       {"", "\x0a", "\x0a\x05\x08", "\x0a\x01\x08", "\x08\x01", "\x0a\x02\x18\x01"}) {
    status.SetPayload(kRetryInfoType, absl::Cord(bytes));
    EXPECT_FALSE(RetryAfter(status).has_value()) << bytes;
  }
}

}  // namespace
}  // namespace codistill
