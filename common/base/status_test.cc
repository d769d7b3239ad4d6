#include "common/base/status.h"

#include <memory>

#include "absl/strings/cord.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

absl::Status Fail() { return absl::NotFoundError("no such shard"); }
absl::StatusOr<std::unique_ptr<int>> MakeInt(bool ok) {
  if (!ok) return absl::OutOfRangeError("too large");
  return std::make_unique<int>(7);
}

absl::Status UseReturnIfError(absl::Status status, bool* reached_end) {
  CODISTILL_RETURN_IF_ERROR(status);
  *reached_end = true;
  return absl::OkStatus();
}

absl::StatusOr<int> UseAssignOrReturn(bool ok) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<int> value, MakeInt(ok));
  CODISTILL_ASSIGN_OR_RETURN(auto second, MakeInt(true));
  CODISTILL_RETURN_IF_ERROR(MakeInt(true));
  return *value + *second;
}

TEST(StatusMacrosTest, ReturnIfErrorStopsAtTheError) {
  bool reached_end = false;
  EXPECT_EQ(UseReturnIfError(Fail(), &reached_end), Fail());
  EXPECT_FALSE(reached_end);
  EXPECT_TRUE(UseReturnIfError(absl::OkStatus(), &reached_end).ok());
  EXPECT_TRUE(reached_end);
}

TEST(StatusMacrosTest, AssignOrReturnMovesValuesAndForwardsErrors) {
  EXPECT_EQ(UseAssignOrReturn(true).value(), 14);
  EXPECT_EQ(UseAssignOrReturn(false).status(), absl::OutOfRangeError("too large"));
}

TEST(AnnotateTest, KeepsCodeAndPayloads) {
  absl::Status status = absl::UnavailableError("connection refused");
  status.SetPayload("type.example/retry", absl::Cord("5s"));
  absl::Status annotated = Annotate(status, "while pulling from shard 3");
  EXPECT_EQ(annotated.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(annotated.message(), "while pulling from shard 3: connection refused");
  ASSERT_TRUE(annotated.GetPayload("type.example/retry").has_value());
  EXPECT_EQ(*annotated.GetPayload("type.example/retry"), "5s");
}

TEST(AnnotateTest, LeavesOkAndEmptyContextAlone) {
  EXPECT_TRUE(Annotate(absl::OkStatus(), "anything").ok());
  EXPECT_EQ(Annotate(Fail(), ""), Fail());
  EXPECT_EQ(Annotate(absl::AbortedError(""), "at step 4").message(), "at step 4");
}

TEST(ErrorListTest, OneMessageALine) {
  ErrorList errors;
  EXPECT_TRUE(errors.empty());
  EXPECT_TRUE(errors.ToStatus("job.textproto").ok());
  errors.Add("groups", "is empty; want at least one");
  errors.Add(absl::OkStatus());
  errors.Add(Fail());
  EXPECT_EQ(errors.size(), 2u);
  EXPECT_EQ(errors.ToStatus(),
            absl::InvalidArgumentError("groups: is empty; want at least one\nno such shard"));
  EXPECT_EQ(errors.ToStatus("2 errors:").message(),
            "2 errors:\ngroups: is empty; want at least one\nno such shard");
}

TEST(ErrorListTest, IsBounded) {
  ErrorList errors(/*max_errors=*/2);
  for (int i = 0; i < 5; ++i) errors.Add("bad");
  EXPECT_EQ(errors.size(), 5u);
  EXPECT_EQ(errors.ToStatus().message(), "bad\nbad\n(and 3 more errors)");
}

}  // namespace
}  // namespace codistill
