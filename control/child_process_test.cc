#include "control/child_process.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

std::string LogPath(const std::string& name) { return ::testing::TempDir() + "/" + name; }

ExitState Wait(ChildProcess* child) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!child->Poll() && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(2));
  EXPECT_TRUE(child->Poll().has_value());
  return child->Poll().value_or(ExitState{-1, -1});
}

TEST(ChildProcessTest, ReportsExitCodeAndKeepsOutput) {
  const std::string log = LogPath("exit.log");
  auto child = ChildProcess::Start({"/bin/sh", "-c", "echo first; echo second >&2; exit 3"}, log);
  ASSERT_TRUE(child.ok()) << child.status();
  const ExitState exit = Wait(&*child);
  EXPECT_EQ(exit.exit_code, 3);
  EXPECT_EQ(exit.signal, 0);
  EXPECT_FALSE(exit.clean());
  EXPECT_EQ(exit.ToString(), "exited with code 3");
  EXPECT_EQ(TailOfFile(log, 1), "    second\n");
  EXPECT_EQ(TailOfFile(log, 5), "    first\n    second\n");
}

TEST(ChildProcessTest, ReportsSignals) {
  auto child = ChildProcess::Start({"/bin/sleep", "60"}, LogPath("signal.log"));
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_TRUE(child->running());
  child->Signal(SIGKILL);
  const ExitState exit = Wait(&*child);
  EXPECT_EQ(exit.signal, SIGKILL);
  EXPECT_THAT(exit.ToString(), HasSubstr("signal 9"));
  EXPECT_FALSE(child->running());
}

TEST(ChildProcessTest, NamesMissingBinary) {
  const auto child = ChildProcess::Start({"/no/such/binary"}, LogPath("missing.log"));
  EXPECT_EQ(child.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(child.status().message()), HasSubstr("/no/such/binary"));
}

// A parent that dies by SIGKILL takes its children with it.
TEST(ChildProcessTest, NoOrphanOutlivesItsParent) {
  const std::string pid_file = LogPath("orphan.pid");
  unlink(pid_file.c_str());
  const pid_t parent = fork();
  ASSERT_GE(parent, 0);
  if (parent == 0) {
    const auto child = ChildProcess::Start({"/bin/sleep", "60"}, LogPath("orphan.log"));
    if (!child.ok()) _exit(1);
    if (!WriteFileAtomically(pid_file, absl::StrCat(child->pid())).ok()) _exit(1);
    while (true) pause();
  }
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (access(pid_file.c_str(), R_OK) != 0) {
    ASSERT_LT(absl::Now(), deadline);
    absl::SleepFor(absl::Milliseconds(2));
  }
  const pid_t orphan = std::atoi(ReadFile(pid_file, 100)->c_str());
  ASSERT_GT(orphan, 0);
  ASSERT_EQ(kill(orphan, 0), 0);
  kill(parent, SIGKILL);
  waitpid(parent, nullptr, 0);
  // Gone, or a zombie of an init that has not reaped it yet.
  const auto alive = [&] {
    const auto stat = ReadFile(absl::StrCat("/proc/", orphan, "/stat"), 4096);
    return stat.ok() && stat->find(") Z") == std::string::npos;
  };
  while (alive()) {
    ASSERT_LT(absl::Now(), deadline) << "child " << orphan << " is still running";
    absl::SleepFor(absl::Milliseconds(2));
  }
}

}  // namespace
}  // namespace codistill
