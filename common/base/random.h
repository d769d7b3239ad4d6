// Stateless random numbers. Every number is a function of what it is for (job seed, group, step,
// rank, example, ...), never of how many were drawn before: a restarted process draws the same, in
// any order, with nothing to save. Not for cryptography. All integer results are the same on every
// platform; they are part of what a resumed job relies on, so the functions must not change.

#ifndef CODISTILL_COMMON_BASE_RANDOM_H_
#define CODISTILL_COMMON_BASE_RANDOM_H_

#include <cstdint>
#include <limits>

#include "absl/strings/string_view.h"

namespace codistill {

// A bijection of 64-bit words in which every input bit affects every output bit (SplitMix64's
// finaliser).
constexpr uint64_t MixBits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A hash of a sequence of words; order and number of words matter.
constexpr uint64_t Mix(uint64_t a) { return MixBits(a + 0x9e3779b97f4a7c15u); }
template <typename... More>
constexpr uint64_t Mix(uint64_t a, uint64_t b, More... more) {
  return Mix(Mix(a) ^ b, static_cast<uint64_t>(more)...);
}

// A stable hash of a name, to be used as a word of Mix.
uint64_t HashString(absl::string_view text);

// Uniform in [0, 1), with 53 random bits, from one hash.
constexpr double UniformDouble(uint64_t hash) {
  return static_cast<double>(hash >> 11) * 0x1.0p-53;
}

// Standard normal from one hash (Box-Muller). At most 8.6 in magnitude.
double NormalDouble(uint64_t hash);

// A stream of random words for loops; a UniformRandomBitGenerator. Cheap to make, copyable, not
// thread-safe.
class RandomStream {
 public:
  using result_type = uint64_t;

  explicit RandomStream(uint64_t seed) : state_(Mix(seed)) {}
  // The stream of one rank of one group in one step.
  RandomStream(uint64_t job_seed, absl::string_view group, uint64_t step, uint64_t rank)
      : RandomStream(Mix(job_seed, HashString(group), step, rank)) {}

  uint64_t Next() { return MixBits(state_ += 0x9e3779b97f4a7c15u); }
  uint64_t operator()() { return Next(); }
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return std::numeric_limits<uint64_t>::max(); }

  double Uniform() { return UniformDouble(Next()); }
  double Normal() { return NormalDouble(Next()); }
  // Uniform in [0, n), unbiased; n > 0.
  uint64_t Below(uint64_t n);

 private:
  uint64_t state_;
};

// A seeded permutation of [0, n), evaluated at any point without memory: a Feistel network over the
// next power of two, walked until it lands inside (fewer than two rounds on average). Used to
// shuffle epochs: position -> example. Immutable, thread-safe.
class Permutation {
 public:
  // n > 0.
  Permutation(uint64_t seed, uint64_t n);

  // The image of i < n.
  uint64_t operator()(uint64_t i) const;
  uint64_t size() const { return n_; }

 private:
  static constexpr int kRounds = 8;

  uint64_t n_;
  int low_bits_;
  uint64_t low_mask_, high_mask_;
  uint64_t keys_[kRounds];
};

// Permutation(seed, n)(i), for single look-ups.
uint64_t PermutedIndex(uint64_t seed, uint64_t n, uint64_t i);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_RANDOM_H_
