#include "common/base/thread_priority.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <thread>

#include "gtest/gtest.h"

namespace codistill {
namespace {

int NiceOfThisThread() { return getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid))); }

TEST(ThreadPriorityTest, LowersTheCallingThreadAndWhatItStartsAndNoOther) {
  const int before = NiceOfThisThread();
  int lowered = 0, child = 0;
  bool done = false;
  std::thread([&] {
    done = LowerThreadPriority();
    lowered = NiceOfThisThread();
    std::thread([&] { child = NiceOfThisThread(); }).join();
  }).join();
  EXPECT_TRUE(done);
  EXPECT_EQ(lowered, before + 10 < 19 ? before + 10 : 19);
  EXPECT_EQ(child, lowered);
  EXPECT_EQ(NiceOfThisThread(), before);
}

}  // namespace
}  // namespace codistill
