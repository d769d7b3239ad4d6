#include "common/base/random.h"

#include <cmath>

namespace codistill {

uint64_t HashString(absl::string_view text) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3u;
  return Mix(hash, text.size());
}

double NormalDouble(uint64_t hash) {
  constexpr double kTwoPi = 6.283185307179586476925;
  // In (0, 1]: the logarithm must be finite.
  const double u = static_cast<double>((Mix(hash, 1) >> 11) + 1) * 0x1.0p-53;
  const double v = UniformDouble(Mix(hash, 2));
  return std::sqrt(-2.0 * std::log(u)) * std::cos(kTwoPi * v);
}

uint64_t RandomStream::Below(uint64_t n) {
  // Multiply-shift with rejection of the few low products that would make some values likelier.
  const uint64_t reject_below = -n % n;
  while (true) {
    const unsigned __int128 product = static_cast<unsigned __int128>(Next()) * n;
    if (static_cast<uint64_t>(product) >= reject_below) return static_cast<uint64_t>(product >> 64);
  }
}

Permutation::Permutation(uint64_t seed, uint64_t n) : n_(n) {
  int bits = 0;
  while (bits < 64 && (n - 1) >> bits != 0) ++bits;
  low_bits_ = (bits + 1) / 2;
  const int high_bits = bits - low_bits_;
  low_mask_ = (uint64_t{1} << low_bits_) - 1;
  high_mask_ = (uint64_t{1} << high_bits) - 1;
  for (int r = 0; r < kRounds; ++r) keys_[r] = Mix(seed, n, r);
}

uint64_t Permutation::operator()(uint64_t i) const {
  do {
    // Each half round changes one half by a function of the other, so it can be undone: whatever
    // the function, the whole is a bijection of the power of two, and walking its cycles until the
    // first value below n is a bijection of [0, n).
    uint64_t low = i & low_mask_, high = i >> low_bits_;
    for (int r = 0; r < kRounds; r += 2) {
      low ^= MixBits(high + keys_[r]) & low_mask_;
      high ^= MixBits(low + keys_[r + 1]) & high_mask_;
    }
    i = high << low_bits_ | low;
  } while (i >= n_);
  return i;
}

uint64_t PermutedIndex(uint64_t seed, uint64_t n, uint64_t i) { return Permutation(seed, n)(i); }

}  // namespace codistill
