#include "common/base/crc32c.h"

#include <array>
#include <cstddef>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

// A CRC register is a polynomial over GF(2) modulo P, stored with the coefficient of x^31 in bit 0
// ("reflected"). Feeding one zero bit multiplies it by x. Everything below follows from that:
// tables are products with powers of x, and appending n zero bytes is a product with x^(8n).
//
// The hardware instruction takes 3 cycles but starts every cycle, so long inputs are summed as
// three interleaved streams of equal length, which are then joined by such a product (by table).

namespace codistill {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected, x^32 left out

constexpr uint32_t TimesX(uint32_t a) { return (a >> 1) ^ ((a & 1) ? kPolynomial : 0); }

constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit) {  // coefficient of x^(31 - bit) in a
    if ((a >> bit) & 1) product ^= b;
    b = TimesX(b);
  }
  return product;
}

// x^(8 n) mod P.
constexpr uint32_t PowerOfZeroBytes(uint64_t n) {
  uint32_t result = 0x80000000;  // x^0
  uint32_t square = 0x00800000;  // x^8
  for (; n > 0; n >>= 1) {
    if (n & 1) result = Multiply(result, square);
    square = Multiply(square, square);
  }
  return result;
}

using Table = std::array<uint32_t, 256>;

// tables[k][v]: effect of byte v followed by k zero bytes.
constexpr std::array<Table, 8> MakeByteTables() {
  std::array<Table, 8> tables{};
  for (uint32_t v = 0; v < 256; ++v) {
    uint32_t crc = v;
    for (int bit = 0; bit < 8; ++bit) crc = TimesX(crc);
    tables[0][v] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (uint32_t v = 0; v < 256; ++v) {
      const uint32_t previous = tables[k - 1][v];
      tables[k][v] = (previous >> 8) ^ tables[0][previous & 255];
    }
  }
  return tables;
}
constexpr std::array<Table, 8> kByteTables = MakeByteTables();

uint32_t ExtendByte(uint32_t state, uint8_t byte) {
  return (state >> 8) ^ kByteTables[0][(state ^ byte) & 255];
}

#if defined(__x86_64__)

// Product of a register with x^(8 n) for one fixed n, as four look-ups.
class AppendZeros {
 public:
  explicit AppendZeros(uint64_t n) {
    const uint32_t power = PowerOfZeroBytes(n);
    for (int k = 0; k < 4; ++k) {
      for (uint32_t v = 0; v < 256; ++v) tables_[k][v] = Multiply(v << (8 * k), power);
    }
  }
  uint32_t operator()(uint32_t state) const {
    return tables_[0][state & 255] ^ tables_[1][(state >> 8) & 255] ^
           tables_[2][(state >> 16) & 255] ^ tables_[3][state >> 24];
  }

 private:
  std::array<Table, 4> tables_;
};

__attribute__((target("sse4.2"))) inline uint64_t Step8(uint64_t state, const char* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm_crc32_u64(state, word);
}

// Sums as many groups of three blocks as `n` holds; advances the input.
template <size_t kBlock>
__attribute__((target("sse4.2"))) uint32_t ThreeStreams(uint32_t state, const char*& p, size_t& n) {
  static_assert(kBlock % 8 == 0, "blocks are summed eight bytes at a time");
  static const AppendZeros* const append = new AppendZeros(kBlock);
  for (; n >= 3 * kBlock; p += 3 * kBlock, n -= 3 * kBlock) {
    uint64_t a = state, b = 0, c = 0;
    for (size_t i = 0; i < kBlock; i += 8) {
      a = Step8(a, p + i);
      b = Step8(b, p + kBlock + i);
      c = Step8(c, p + 2 * kBlock + i);
    }
    state = (*append)(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    state = (*append)(state) ^ static_cast<uint32_t>(c);
  }
  return state;
}

#endif  // defined(__x86_64__)

}  // namespace

namespace internal {

uint32_t Crc32cExtendPortable(uint32_t crc, absl::string_view data) {
  const auto* p = reinterpret_cast<const uint8_t*>(data.data());
  size_t n = data.size();
  uint32_t state = ~crc;
  for (; n >= 8; p += 8, n -= 8) {
    // Bytes are combined by position, so this holds for either byte order.
    const uint32_t low =
        state ^ (p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24);
    state = kByteTables[7][low & 255] ^ kByteTables[6][(low >> 8) & 255] ^
            kByteTables[5][(low >> 16) & 255] ^ kByteTables[4][low >> 24] ^ kByteTables[3][p[4]] ^
            kByteTables[2][p[5]] ^ kByteTables[1][p[6]] ^ kByteTables[0][p[7]];
  }
  for (; n > 0; ++p, --n) state = ExtendByte(state, *p);
  return ~state;
}

#if defined(__x86_64__)

bool Crc32cHardwareAvailable() { return __builtin_cpu_supports("sse4.2") != 0; }

__attribute__((target("sse4.2"))) uint32_t Crc32cExtendHardware(uint32_t crc,
                                                                absl::string_view data) {
  const char* p = data.data();
  size_t n = data.size();
  uint32_t state = ~crc;
  state = ThreeStreams<4096>(state, p, n);
  state = ThreeStreams<256>(state, p, n);
  uint64_t wide = state;
  for (; n >= 8; p += 8, n -= 8) wide = Step8(wide, p);
  state = static_cast<uint32_t>(wide);
  for (; n > 0; ++p, --n) state = _mm_crc32_u8(state, static_cast<uint8_t>(*p));
  return ~state;
}

#else

bool Crc32cHardwareAvailable() { return false; }
uint32_t Crc32cExtendHardware(uint32_t crc, absl::string_view data) {
  return Crc32cExtendPortable(crc, data);
}

#endif

}  // namespace internal

uint32_t Crc32cExtend(uint32_t crc, absl::string_view data) {
  static const bool hardware = internal::Crc32cHardwareAvailable();
  return hardware ? internal::Crc32cExtendHardware(crc, data)
                  : internal::Crc32cExtendPortable(crc, data);
}

uint32_t Crc32cConcat(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  // The inversions before and after cancel, as they do for any CRC of this form.
  return Multiply(crc_a, PowerOfZeroBytes(length_b)) ^ crc_b;
}

}  // namespace codistill
