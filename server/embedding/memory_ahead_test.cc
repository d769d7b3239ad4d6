#include "server/embedding/memory_ahead.h"

#include <algorithm>
#include <vector>

#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr size_t kBlock = HugeMemory::kUnit;

bool Eventually(const MemoryAhead& memory, size_t ready) {
  for (const absl::Time end = absl::Now() + absl::Seconds(20); absl::Now() < end;) {
    if (memory.ready() == ready) return true;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return false;
}

TEST(MemoryAheadTest, MakesNothingForWhatStaysSmall) {
  MemoryAhead memory(kBlock, 3);
  for (int i = 0; i + 1 < MemoryAhead::kSmall; ++i) EXPECT_EQ(memory.Take().size(), kBlock);
  EXPECT_EQ(memory.ready(), 0u);
  EXPECT_EQ(memory.bytes(), 0u);
}

TEST(MemoryAheadTest, KeepsZeroedBlocksReady) {
  MemoryAhead memory(kBlock, 3);
  std::vector<HugeMemory> taken;
  for (int i = 0; i < MemoryAhead::kSmall; ++i) taken.push_back(memory.Take());
  ASSERT_TRUE(Eventually(memory, 1));
  EXPECT_EQ(memory.bytes(), kBlock);
  while (taken.size() < 3 * MemoryAhead::kShare + 5) taken.push_back(memory.Take());
  for (HugeMemory& block : taken) {
    ASSERT_EQ(block.size(), kBlock);
    EXPECT_EQ(std::count(block.data(), block.data() + kBlock, 0), static_cast<long>(kBlock));
    std::fill(block.data(), block.data() + kBlock, 1);  // nobody else's
  }
  EXPECT_TRUE(Eventually(memory, 3));
  memory.Clear();
  EXPECT_EQ(memory.Take().size(), kBlock);
  EXPECT_EQ(memory.ready(), 0u);
}

TEST(MemoryAheadTest, EndsWhileABlockIsMade) {
  for (int i = 0; i < 20; ++i) {
    MemoryAhead memory(kBlock, 2);
    for (int j = 0; j < MemoryAhead::kSmall; ++j) memory.Take();
  }
}

}  // namespace
}  // namespace codistill
