#include "common/checkpoint/directory_claim.h"

#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/base/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

class DirectoryClaimTest : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "claims",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
  }
  std::unique_ptr<DirectoryClaim> Take(const std::string& name = "CLAIM",
                                       const std::string& owner = "me") {
    auto claim = DirectoryClaim::Take(directory_, name, owner);
    EXPECT_TRUE(claim.ok()) << claim.status();
    return *std::move(claim);
  }
  std::string directory_;
};

TEST_F(DirectoryClaimTest, TheNewestWins) {
  const auto first = Take();
  EXPECT_EQ(first->number(), 1u);
  EXPECT_TRUE(first->Check().ok());
  const auto second = Take("CLAIM", "node7, process 12");
  EXPECT_EQ(second->number(), 2u);
  EXPECT_TRUE(second->Check().ok());
  const absl::Status lost = first->Check();
  EXPECT_EQ(lost.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(lost.message()), HasSubstr("CLAIM-2 (node7, process 12)"));
  EXPECT_THAT(FileSystem::Real()->ListDir(directory_).value(), testing::ElementsAre("CLAIM-2"));
}

TEST_F(DirectoryClaimTest, NamesAreApart) {
  const auto leader = Take("CLAIM");
  const auto shard = Take("SHARD-1-CLAIM");
  const auto other = Take("SHARD-11-CLAIM");
  EXPECT_TRUE(leader->Check().ok());
  EXPECT_TRUE(shard->Check().ok());
  EXPECT_TRUE(other->Check().ok());
}

TEST_F(DirectoryClaimTest, ADirectoryThatIsGoneIsNoNewerClaim) {
  const auto claim = Take();
  ASSERT_TRUE(RemoveAll(directory_).ok());
  EXPECT_NE(claim->Check().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(DirectoryClaimTest, OfManyAtOnceOneIsTheNewest) {
  std::vector<std::thread> threads;
  Mutex mu;
  std::vector<std::unique_ptr<DirectoryClaim>> claims;
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([&] {
      auto claim = Take();
      MutexLock lock(&mu);
      claims.push_back(std::move(claim));
    });
  }
  for (std::thread& thread : threads) thread.join();
  int owners = 0;
  for (const auto& claim : claims) {
    owners += claim->Check().ok() ? 1 : 0;
  }
  EXPECT_EQ(owners, 1);
}

// Two real processes: the older one ends by itself once the newer has begun.
TEST_F(DirectoryClaimTest, TheOlderProcessLoses) {
  const pid_t child = fork();
  if (child == 0) {
    auto claim = DirectoryClaim::Take(directory_, "CLAIM", "the older");
    if (!claim.ok()) _exit(2);
    for (int i = 0; i < 2000; ++i) {
      if (absl::IsFailedPrecondition((*claim)->Check())) _exit(7);
      usleep(5000);
    }
    _exit(3);
  }
  while (FileSystem::Real()->ListDir(directory_).value().empty()) usleep(1000);
  const auto newer = Take("CLAIM", "the newer");
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_TRUE(newer->Check().ok());
}

}  // namespace
}  // namespace codistill
