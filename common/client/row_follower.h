#ifndef CODISTILL_COMMON_CLIENT_ROW_FOLLOWER_H_
#define CODISTILL_COMMON_CLIENT_ROW_FOLLOWER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Reads the embedding tables of published cuts from all shards of a group, one after the other:
// whole or, where the shards still know them, the changes since an older cut. Used by one thread,
// but for Cancel.
class RowFollower {
 public:
  struct Options {
    GroupRef group;
    uint64_t shard_map_digest = 0;
    std::vector<std::string> shard_addresses;  // by shard index
    std::vector<int64_t> dims;                 // of the job's tables
  };
  static std::unique_ptr<RowFollower> Create(Options options);
  virtual ~RowFollower() = default;

  // What a shard sends, in its order; later calls replace what earlier ones said of a key.
  class Sink {
   public:
    virtual ~Sink() = default;
    // A shard's answer begins. `whole`: its rows are all it has; what is held of its keys goes.
    virtual absl::Status Begin(int shard, bool whole) = 0;
    // `rows`: keys.size() * dim floats.
    virtual void Put(int table, absl::Span<const uint64_t> keys, absl::Span<const float> rows) = 0;
    virtual void Erase(int table, absl::Span<const uint64_t> keys) = 0;
  };
  struct Result {
    // False: rows of some shard are of a later step than the cut; they are those of the next cut
    // once its changes are applied.
    bool exact = true;
    uint64_t bytes = 0;
  };
  // `since` < 0: whole tables. Errors name the shard; ABORTED: the cut is not known any more.
  virtual absl::StatusOr<Result> Read(uint64_t generation, int64_t cut_step, int64_t since,
                                      absl::Time deadline, Sink* sink) = 0;
  // Ends a Read in progress with CANCELLED. Any thread.
  virtual void Cancel() = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_ROW_FOLLOWER_H_
