#include "common/base/heap.h"

#include <malloc.h>

#include <cstdlib>
#include <cstring>

#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr size_t kLarge = 64 << 20;

TEST(HeapTest, LargeBlocksStayWithTheProcess) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's heap is not glibc's";
#endif
  ConfigureHeapForTensors();
  const struct mallinfo2 before = mallinfo2();
  void* block = std::malloc(kLarge);
  ASSERT_NE(block, nullptr);
  std::memset(block, 1, kLarge);
  const struct mallinfo2 during = mallinfo2();
  EXPECT_EQ(during.hblkhd, before.hblkhd) << "the block is a mapping of its own";
  EXPECT_GE(during.uordblks, before.uordblks + kLarge);
  std::free(block);
  const struct mallinfo2 after = mallinfo2();
  EXPECT_GE(after.fordblks, kLarge) << "the block went back to the system";
}

}  // namespace
}  // namespace codistill
