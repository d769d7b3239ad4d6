#ifndef CODISTILL_COMMON_EMBEDDING_ROW_PLACEMENT_H_
#define CODISTILL_COMMON_EMBEDDING_ROW_PLACEMENT_H_

#include <cstdint>

#include "common/base/random.h"

namespace codistill {

// The hash by which keys are placed. Checkpoints and running groups depend on it: it must not
// change.
constexpr uint64_t KeyHash(uint64_t key) { return MixBits(key + 0x6a09e667f3bcc909u); }

// Every shard holds an equal range of the hashes of every table: shard s those in
// [ceil(s * 2^64 / num_shards), ceil((s + 1) * 2^64 / num_shards)). num_shards >= 1.
constexpr int ShardOfHash(uint64_t hash, int num_shards) {
  return static_cast<int>(
      (static_cast<unsigned __int128>(hash) * static_cast<uint64_t>(num_shards)) >> 64);
}
constexpr int ShardOfKey(uint64_t key, int num_shards) {
  return ShardOfHash(KeyHash(key), num_shards);
}

}  // namespace codistill

#endif  // CODISTILL_COMMON_EMBEDDING_ROW_PLACEMENT_H_
