// A disk that fills up: the checkpoint that did not fit is told of, the one before is whole, and
// the job goes on once there is room.

#include <sched.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "gtest/gtest.h"
#include "tests/integration/ctl_harness.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

// One whose checkpoint is far larger than all its logs.
JobConfig LargeJob() {
  JobConfig job = MlpJob("large", 1);
  for (auto& option : *job.mutable_model()->mutable_export_()->mutable_options()) {
    if (option.key() == "hidden") option.set_value("1024,512");
  }
  job.mutable_stop()->set_steps(30);
  return job;
}

// A small file system of memory at `directory`, seen by this process and its children only, so that
// it is gone with them. False where the system does not allow it.
bool MountSmallDisk(const std::string& directory) {
  return unshare(CLONE_NEWNS) == 0 &&
         mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         mount("tmpfs", directory.c_str(), "tmpfs", 0, "size=24m") == 0;
}

// Leaves `spare` bytes.
void Fill(const std::string& path, size_t spare) {
  struct statvfs fs;
  ASSERT_EQ(statvfs(DirName(path).c_str(), &fs), 0);
  const size_t free = static_cast<size_t>(fs.f_bavail) * fs.f_bsize;
  ASSERT_GT(free, spare);
  std::ofstream file(path, std::ios::binary);
  const std::vector<char> zeros(1 << 16);
  for (size_t left = free - spare; left > 0;) {
    const size_t n = std::min(left, zeros.size());
    file.write(zeros.data(), n);
    left -= n;
  }
  file.close();
  ASSERT_TRUE(file.good()) << path;
}

// `command` runs with `prefix` before it in the run that must not find room.
void CheckFullDisk(const std::string& out, const std::vector<std::string>& prefix,
                   const std::string& filler) {
  OrphanCatcher catcher;
  const std::string job = WriteJob(LargeJob());
  const CommandResult first = Ctl({"run", job, "--out", out});
  ASSERT_TRUE(first.exit.clean()) << first.exit.ToString() << first.err;
  ASSERT_EQ(VerifiedCheckpoints(out, "alpha"), (std::vector<int64_t>{30}));

  if (!filler.empty()) Fill(filler, 1 << 20);
  std::vector<std::string> argv = prefix;
  for (const std::string& arg :
       CtlArgv({"run", job, "--out", out, "--resume", "--steps", "60", "--timeout", "60"})) {
    argv.push_back(arg);
  }
  const CommandResult full = Command(argv).Wait();
  EXPECT_EQ(full.exit.signal, 0) << full.err;
  EXPECT_NE(full.exit.exit_code, 0);
  EXPECT_FALSE(absl::StrContains(full.err, "not done within --timeout")) << "an endless wait";
  EXPECT_TRUE(absl::StrContains(full.err, out + "/checkpoints/alpha/")) << full.err;
  EXPECT_TRUE(absl::StrContains(full.err, filler.empty() ? "too large" : "space")) << full.err;
  EXPECT_TRUE(ProcessesWith(out).empty());
  EXPECT_EQ(VerifiedCheckpoints(out, "alpha"), (std::vector<int64_t>{30}));

  if (!filler.empty()) {
    ASSERT_EQ(unlink(filler.c_str()), 0);
  }
  const CommandResult resumed = Ctl({"run", job, "--out", out, "--resume", "--steps", "60"});
  ASSERT_TRUE(resumed.exit.clean()) << resumed.exit.ToString() << resumed.err;
  EXPECT_EQ(VerifiedCheckpoints(out, "alpha").back(), 60);
  const nlohmann::json summary = ReadJson(out + "/summary.json");
  EXPECT_EQ(summary["groups"][0]["steps"], 60);
}

// Must stay the first: a file system is mounted for the rest of the process.
TEST(FullDiskTest, ACheckpointThatDoesNotFitLeavesTheOneBefore) {
  const std::string out = NewDirectory("small-disk");
  if (!MountSmallDisk(out)) GTEST_SKIP() << "mounting a small file system needs root";
  CheckFullDisk(out, {}, out + "/filler");
}

TEST(FullDiskTest, ALimitOnFileSizesIsToldOfToo) {
  // Blocks of 512 bytes; the signal that comes with the limit is ignored, so that writing fails.
  CheckFullDisk(NewDirectory("small-files") + "/run",
                {"/bin/sh", "-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""}, "");
}

}  // namespace
}  // namespace codistill
