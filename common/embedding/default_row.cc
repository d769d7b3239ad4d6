#include "common/embedding/default_row.h"

#include <cstddef>

#include "common/base/random.h"

namespace codistill {
namespace {

// 24 random bits as an integer in [-2^23, 2^23): exact in fp32, as is its product with 2^-23.
float Centred(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 8) - (1 << 23)) * 0x1.0p-23f;
}

}  // namespace

uint64_t TableSeed(uint64_t seed, absl::string_view group, absl::string_view table) {
  return Mix(seed, HashString(group), HashString(table));
}

void DefaultRow(const RowInit& init, uint64_t key, absl::Span<float> row) {
  const float scale = init.scale;
  uint64_t word = Mix(init.seed, key);
  // One word gives two elements.
  size_t i = 0;
  for (; i + 2 <= row.size(); i += 2) {
    const uint64_t bits = MixBits(word += 0x9e3779b97f4a7c15u);
    row[i] = scale * Centred(static_cast<uint32_t>(bits));
    row[i + 1] = scale * Centred(static_cast<uint32_t>(bits >> 32));
  }
  if (i < row.size()) {
    row[i] = scale * Centred(static_cast<uint32_t>(MixBits(word + 0x9e3779b97f4a7c15u)));
  }
}

}  // namespace codistill
