#ifndef CODISTILL_SERVER_SHARD_STORE_H_
#define CODISTILL_SERVER_SHARD_STORE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "proto/checkpoint.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/aligned_buffer.h"
#include "server/optimizer.h"
#include "server/piece_layout.h"
#include "server/staged_push.h"

namespace codistill {

// The model as one shard has it: the values of its pieces, their optimizer slots, the cuts that
// readers see and the snapshot that becomes a checkpoint. Knows nothing of generations, ranks or
// calls: server/ shard.h decides what happens when.
//
// One thread at a time calls the methods that change something (the shard's executor); the const
// ones are thread-safe beside it. Readers of live weights are held up for the update of one block
// (64 KiB), never of the whole shard; readers of cuts never wait.
class ShardStore {
 public:
  struct Options {
    ShardMap map;
    int shard = 0;
    OptimizerConfig optimizer;
    int held_cuts = 2;  // the newest ones; never fewer than one
  };
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(Options options);

  const PieceLayout& layout() const { return layout_; }

  // ---------------------------------------------------------------------------------- loading

  // Version 0: values from the archive's safetensors file, of which `warm_start` (empty: none)
  // replaces those it has. Slots become zeros, cuts and snapshot go. Errors name file and tensor.
  absl::Status LoadInitial(const std::string& weights, const std::string& warm_start,
                           FileSystem* file_system);

  // From this shard's file of a checkpoint. DATA_LOSS names file and place. On error the values are
  // unspecified.
  absl::Status LoadCheckpoint(const std::string& path, const CheckpointManifest& manifest,
                              FileSystem* file_system);

  // ---------------------------------------------------------------------------------- training

  // Memory for a push. Thread-safe.
  std::shared_ptr<StagedPush> NewPush(const PushBegin& begin) const;

  struct Contribution {
    const StagedPush* push = nullptr;
    int64_t num_examples = 0;
  };
  struct Update {
    int64_t step = 0;  // the step this makes; numbers the optimizer's bias correction too
    double learning_rate = 0;
    double weight_decay = 0;
    double clip_scale = 1;
  };
  // Makes the next step: parameters by the optimizer from clip_scale * sum(n_i g_i) / sum(n_i),
  // summed in the order given, buffers by CombineBuffers. Without contributions, or with no
  // examples in them, only the step is counted.
  void Apply(const Update& update, absl::Span<const Contribution> contributions);

  // Number of updates in the values; during Apply still the old one.
  int64_t step() const;

  // ---------------------------------------------------------------------------------- reading

  // An immutable copy of the values.
  struct Cut {
    int64_t label = 0;  // the group's step this cut stands for
    int64_t step = 0;   // of this shard
    std::shared_ptr<const AlignedBuffer> values;
  };
  // Makes the present values readable as the cut `label`, unless there is one already, and drops
  // the oldest beyond held_cuts.
  void Publish(int64_t label);
  // Null if it is not held (any more).
  std::shared_ptr<const Cut> FindCut(int64_t label) const;
  int64_t newest_cut() const;  // label; -1 = none
  // Forgets all cuts and the snapshot. Readers that hold a cut keep it.
  void DropCuts();

  // Copies `count` elements of a piece from element `begin` (of the tensor) of the values as they
  // are now. With `exact_step` >= 0: ABORTED unless the values are those of exactly that step.
  absl::Status ReadLive(int piece, int64_t begin, int64_t count, int64_t exact_step,
                        void* to) const;

  // ------------------------------------------------------------------------------- checkpoints

  // Everything a checkpoint of this shard needs.
  struct Snapshot {
    int64_t label = 0;
    int64_t step = 0;
    std::shared_ptr<const AlignedBuffer> values;
    std::vector<std::shared_ptr<const AlignedBuffer>> slots;  // by Optimizer::SlotNames()
  };
  // Keeps the present state for WriteCheckpoint; replaces an older snapshot.
  void TakeSnapshot(int64_t label);
  std::shared_ptr<const Snapshot> snapshot(int64_t label) const;  // null if there is none of it
  void DropSnapshot(int64_t label);

  // Writes a snapshot as this shard's file; `identity` has the group, version and digest.
  // Thread-safe.
  absl::StatusOr<CheckpointFile> WriteSnapshot(const Snapshot& snapshot,
                                               const std::string& directory,
                                               const std::string& name,
                                               CheckpointShardHeader identity,
                                               FileSystem* file_system) const;

  uint64_t values_bytes() const { return layout_.buffer_bytes(); }

 private:
  ShardStore(Options options, PieceLayout layout);
  void ApplyPiece(const ShardPiece& piece, const Update& update,
                  absl::Span<const Contribution> contributions, absl::Span<const double> weights);
  void CombinePiece(const ShardPiece& piece, absl::Span<const Contribution> contributions,
                    absl::Span<const double> weights);
  void Clear();

  const Options options_;
  const PieceLayout layout_;
  const Optimizer optimizer_;
  const std::vector<std::string> slot_names_;
  mutable BufferPool pool_;

  // Guards the values against torn reads, block by block. Written under it, and by one thread only,
  // which therefore reads without it.
  mutable Mutex values_mu_;
  AlignedBuffer values_;
  std::vector<AlignedBuffer> slots_;
  int64_t step_ ABSL_GUARDED_BY(values_mu_) = 0;
  bool updating_ ABSL_GUARDED_BY(values_mu_) = false;

  mutable Mutex cuts_mu_;
  std::map<int64_t, std::shared_ptr<const Cut>> cuts_ ABSL_GUARDED_BY(cuts_mu_);
  std::shared_ptr<const Snapshot> snapshot_ ABSL_GUARDED_BY(cuts_mu_);
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_SHARD_STORE_H_
