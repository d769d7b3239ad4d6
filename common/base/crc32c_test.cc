#include "common/base/crc32c.h"

#include <random>
#include <string>

#include "gtest/gtest.h"

namespace codistill {
namespace {

std::string RandomBytes(size_t n) {
  std::mt19937 generator(7);
  std::string bytes(n, '\0');
  for (char& byte : bytes) byte = static_cast<char>(generator());
  return bytes;
}

// One bit at a time, straight from the definition.
uint32_t Naive(absl::string_view data) {
  uint32_t crc = 0xffffffff;
  for (unsigned char byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78 : 0);
  }
  return ~crc;
}

TEST(Crc32cTest, VectorsOfRfc3720) {
  std::string ascending(32, '\0'), descending(32, '\0');
  for (int i = 0; i < 32; ++i) {
    ascending[i] = static_cast<char>(i);
    descending[i] = static_cast<char>(31 - i);
  }
  const unsigned char kReadCommand[48] = {
      0x01, 0xc0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
      0x00, 0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00, 0x00, 0x00, 0x04, 0x00,
      0x00, 0x00, 0x00, 0x14, 0x00, 0x00, 0x00, 0x18, 0x28, 0x00, 0x00, 0x00,
      0x00, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00};
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(Crc32c(ascending), 0x46dd794eu);
  EXPECT_EQ(Crc32c(descending), 0x113fdb5cu);
  EXPECT_EQ(Crc32c(absl::string_view(reinterpret_cast<const char*>(kReadCommand), 48)),
            0xd9963a56u);
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(""), 0u);
}

TEST(Crc32cTest, BothImplementationsAgreeAtAllLengthsAndOffsets) {
  if (!internal::Crc32cHardwareAvailable()) GTEST_SKIP() << "no SSE4.2 on this processor";
  const std::string bytes = RandomBytes(40000);
  const absl::string_view all(bytes);
  for (size_t n : {0, 1, 7, 8, 9, 63, 255, 767, 768, 769, 1536, 5000, 12287, 12288, 12289, 39990}) {
    for (size_t offset : {0, 1, 3, 8}) {
      const absl::string_view part = all.substr(offset, n);
      const uint32_t expected = Naive(part);
      EXPECT_EQ(internal::Crc32cExtendPortable(0, part), expected) << n << " at " << offset;
      EXPECT_EQ(internal::Crc32cExtendHardware(0, part), expected) << n << " at " << offset;
    }
  }
}

TEST(Crc32cTest, ExtendAndConcatEqualTheWhole) {
  const std::string bytes = RandomBytes(20000);
  const absl::string_view all(bytes);
  const uint32_t whole = Crc32c(all);
  for (size_t cut : {0, 1, 100, 4096, 19999, 20000}) {
    const absl::string_view a = all.substr(0, cut), b = all.substr(cut);
    EXPECT_EQ(Crc32cExtend(Crc32c(a), b), whole) << cut;
    EXPECT_EQ(internal::Crc32cExtendPortable(internal::Crc32cExtendPortable(0, a), b), whole);
    EXPECT_EQ(Crc32cConcat(Crc32c(a), Crc32c(b), b.size()), whole) << cut;
  }
}

TEST(Crc32cTest, SeesASingleFlippedBit) {
  std::string bytes = RandomBytes(5000);
  const uint32_t before = Crc32c(bytes);
  bytes[1234] ^= 0x10;
  EXPECT_NE(Crc32c(bytes), before);
}

}  // namespace
}  // namespace codistill
