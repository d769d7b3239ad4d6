#include "common/rpc/channel.h"

#include <string>

#include "absl/time/clock.h"
#include "common/base/retry_after.h"
#include "common/rpc/grpc_status.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(GrpcStatusTest, RoundTripsEveryCode) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "why");
    EXPECT_EQ(static_cast<int>(ToGrpcStatus(status).error_code()), code);
    EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
  }
  EXPECT_EQ(FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(20), "odd")).code(),
            absl::StatusCode::kUnknown);
}

TEST(GrpcStatusTest, CancelledByNobodyHereIsUnavailable) {
  EXPECT_EQ(FromUncancelledCall(grpc::Status::CANCELLED).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(FromUncancelledCall(grpc::Status(grpc::StatusCode::ABORTED, "x")),
            absl::AbortedError("x"));
  EXPECT_TRUE(FromUncancelledCall(grpc::Status::OK).ok());
}

TEST(GrpcStatusTest, LongMessagesAreCutToWhatTrailersCarry) {
  const grpc::Status status = ToGrpcStatus(absl::InvalidArgumentError(std::string(100000, '\n')));
  EXPECT_LT(status.error_message().size() * 3, 8000u);
  EXPECT_NE(status.error_message().find("97952 more bytes"), std::string::npos);
}

TEST(GrpcStatusTest, CarriesWhenToTryAgain) {
  const absl::Status full =
      WithRetryAfter(absl::ResourceExhaustedError("full"), absl::Milliseconds(250));
  const grpc::Status on_the_wire = ToGrpcStatus(full);
  EXPECT_FALSE(on_the_wire.error_details().empty());
  EXPECT_EQ(FromGrpcStatus(on_the_wire), full);  // payload included
  EXPECT_EQ(RetryAfter(FromGrpcStatus(on_the_wire)), absl::Milliseconds(250));
  EXPECT_TRUE(ToGrpcStatus(absl::ResourceExhaustedError("full")).error_details().empty());
  // What is no google.rpc.Status is passed over.
  const absl::Status odd = FromGrpcStatus(
      grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full", std::string("\x1a\x7f", 2)));
  EXPECT_EQ(odd, absl::ResourceExhaustedError("full"));
}

TEST(RetryUntilTest, WaitsAsLongAsItIsTold) {
  int calls = 0;
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(RetryUntil(absl::Now() + absl::Seconds(20), [&] {
                if (++calls > 1) return absl::OkStatus();
                return WithRetryAfter(absl::ResourceExhaustedError("full"),
                                      absl::Milliseconds(300));
              }).ok());
  EXPECT_EQ(calls, 2);
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(300));
  // Without a hint nothing says that it would be better later.
  EXPECT_EQ(RetryUntil(absl::Now() + absl::Seconds(20),
                       [] { return absl::ResourceExhaustedError("disk"); })
                .code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(RetryUntilTest, RepeatsOnlyWhatIsTransient) {
  int calls = 0;
  EXPECT_TRUE(RetryUntil(absl::Now() + absl::Seconds(20), [&] {
                if (++calls == 1) return absl::UnavailableError("away");
                if (calls == 2) return absl::DeadlineExceededError("slow");
                return absl::OkStatus();
              }).ok());
  EXPECT_EQ(calls, 3);

  calls = 0;
  EXPECT_EQ(RetryUntil(absl::InfiniteFuture(),
                       [&] {
                         ++calls;
                         return absl::AbortedError("generation");
                       })
                .code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(calls, 1);
}

TEST(RetryUntilTest, TriesOnceAndEndsByTheDeadline) {
  int calls = 0;
  const absl::Status status = RetryUntil(absl::InfinitePast(), [&] {
    ++calls;
    return absl::UnavailableError("away");
  });
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(status.message().find("away"), std::string::npos);
}

TEST(RetryUntilTest, StopEndsItInTheMiddleOfAPause) {
  int calls = 0, checks = 0;
  const absl::Status status = RetryUntil(
      absl::InfiniteFuture(),
      [&] {
        ++calls;
        return absl::UnavailableError("away");
      },
      [&] { return ++checks > 3; });
  EXPECT_EQ(status.code(), absl::StatusCode::kCancelled);
  EXPECT_LE(calls, 2);
}

TEST(ChannelTest, AbsentServerIsUnavailableWithinTheDeadline) {
  // Port 1 of loopback: nobody listens there.
  auto channel = MakeChannel("127.0.0.1:1", ChannelUse::kControl);
  EXPECT_FALSE(channel->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Milliseconds(50))));
  EXPECT_GT(MakeContext(absl::Now() + absl::Seconds(5))->deadline(),
            absl::ToChronoTime(absl::Now()));
}

}  // namespace
}  // namespace codistill
