#include "common/base/streaming_copy.h"

#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

class CopyTest : public testing::TestWithParam<void (*)(void*, const void*, size_t)> {};

TEST_P(CopyTest, CopiesEverythingAndNothingElse) {
  constexpr size_t kRoom = 20000;
  std::vector<uint8_t> from(kRoom);
  for (size_t i = 0; i < kRoom; ++i) from[i] = static_cast<uint8_t>(1 + i % 251);
  for (const size_t size : {0, 1, 63, 64, 4095, 4096, 4097, 4159, 4160, 12345}) {
    for (const size_t to_offset : {0, 1, 16, 63}) {
      for (const size_t from_offset : {0, 3, 64}) {
        std::vector<uint8_t> to(kRoom, 0);
        GetParam()(to.data() + to_offset, from.data() + from_offset, size);
        for (size_t i = 0; i < kRoom; ++i) {
          const bool inside = i >= to_offset && i < to_offset + size;
          ASSERT_EQ(to[i], inside ? from[i - to_offset + from_offset] : 0)
              << size << " bytes from " << from_offset << " to " << to_offset << ", byte " << i;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CopyTest, testing::Values(&StreamingCopy, &PrefetchingCopy));

}  // namespace
}  // namespace codistill
