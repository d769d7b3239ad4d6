#include "server/weight_blocks.h"

#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(BlockPoolTest, FreedBlocksGoRound) {
  BlockPool pool(256);
  std::set<const uint8_t*> seen;
  for (int round = 0; round < 5; ++round) {
    std::vector<BlockRef> held;
    for (int i = 0; i < 40; ++i) held.push_back(pool.Get());
    for (const BlockRef& ref : held) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(ref.data()) % 64, 0u);
      seen.insert(ref.data());
    }
    EXPECT_EQ(pool.in_use(), 40u);
  }
  EXPECT_EQ(pool.in_use(), 0u);
  EXPECT_EQ(seen.size(), 40u);
  EXPECT_EQ(pool.allocated(), 48u);  // sixteen at a time
}

TEST(BlockPoolTest, ReservedBlocksAreThere) {
  BlockPool pool(BlockPool::kMaxBlockBytes);
  pool.Reserve(20);
  EXPECT_EQ(pool.allocated(), 20u);
  BlockArray array(&pool, 20 * BlockPool::kMaxBlockBytes - 5);
  EXPECT_EQ(array.size(), 20u);
  EXPECT_EQ(pool.allocated(), 20u);
  pool.Reserve(3);
  EXPECT_EQ(pool.allocated(), 23u);
}

TEST(BlockPoolTest, BlocksOutliveTheirPool) {
  BlockRef kept;
  {
    BlockPool pool(4096);
    kept = pool.Get();
    std::memset(kept.mutable_data(), 7, 4096);
  }
  const BlockRef copy = kept;
  kept = BlockRef();
  EXPECT_EQ(copy.data()[4095], 7);
  EXPECT_TRUE(copy.unique());
}

TEST(BlockUpdateTest, WritesInPlaceUnlessSomebodyElseHoldsTheBlock) {
  BlockPool pool(64);
  BlockArray live(&pool, 128);
  EXPECT_EQ(live.size(), 2u);
  live[0].mutable_data()[0] = 1;
  const auto add = [&] {
    BlockUpdate update(&pool, &live[0]);
    update.to()[0] = static_cast<uint8_t>(update.from()[0] + 1);
    const bool in_place = update.in_place();
    update.Commit();
    return in_place;
  };
  EXPECT_TRUE(add());
  const BlockArray kept = live;
  EXPECT_FALSE(add());
  EXPECT_TRUE(add());  // the fresh one is the array's own
  EXPECT_EQ(live[0].data()[0], 4);
  EXPECT_EQ(kept[0].data()[0], 2);
  EXPECT_EQ(kept[1].data(), live[1].data());
  EXPECT_EQ(pool.in_use(), 3u);
}

// A writer that goes on in place only where readers have let go: they never see a change.
TEST(BlockUpdateTest, ReadersNeverSeeAChange) {
  BlockPool pool(4096);
  Mutex mu;
  BlockArray live(&pool, 4096);
  std::memset(live[0].mutable_data(), 0, 4096);
  bool stop = false;
  int torn = 0;
  std::vector<std::thread> readers;
  for (int r = 0; r < 3; ++r) {
    readers.emplace_back([&] {
      while (true) {
        BlockArray version;
        {
          MutexLock lock(&mu);
          if (stop) return;
          version = live;
        }
        const uint8_t first = version[0].data()[0];
        int differ = 0;
        for (int i = 0; i < 4096; ++i) differ += version[0].data()[i] != first;
        if (differ > 0) {
          MutexLock lock(&mu);
          ++torn;
        }
      }
    });
  }
  for (int step = 0; step < 3000; ++step) {
    MutexLock lock(&mu);  // no reader takes a reference meanwhile
    BlockUpdate update(&pool, &live[0]);
    for (int i = 0; i < 4096; ++i) update.to()[i] = static_cast<uint8_t>(update.from()[i] + 1);
    update.Commit();
  }
  {
    MutexLock lock(&mu);
    stop = true;
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn, 0);
  EXPECT_EQ(live[0].data()[17], 3000 % 256);
}

}  // namespace
}  // namespace codistill
