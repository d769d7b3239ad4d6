#ifndef CODISTILL_SERVER_SHARD_STORE_H_
#define CODISTILL_SERVER_SHARD_STORE_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/base/clock.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/checkpoint/checkpoint_tensors.h"
#include "common/config/parameter_groups.h"
#include "proto/checkpoint.pb.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/aligned_buffer.h"
#include "server/optimizer.h"
#include "server/piece_layout.h"
#include "server/staged_push.h"
#include "server/weight_blocks.h"

namespace codistill {

// The values of one shard at one version, as readers see them: blocks they share with whatever else
// has the same values. Immutable until it is revoked, which ends its readers and frees its memory.
// Thread-safe.
class Cut {
 public:
  Cut(int64_t label, int64_t step, absl::Time made, BlockArray values)
      : label_(label), step_(step), made_(made), values_(std::move(values)) {}

  int64_t label() const { return label_; }  // the group's step this cut stands for
  int64_t step() const { return step_; }    // of this shard
  absl::Time made() const { return made_; }

  // Block `i` of the shard's buffer (PieceLayout), which stays as it is for as long as the
  // reference lives; no block once the cut is revoked.
  BlockRef block(size_t i) const {
    MutexLock lock(&mu_);
    return i < values_.size() ? values_[i] : BlockRef();
  }
  void Revoke() const {
    BlockArray doomed;  // returned to the pool outside the lock
    MutexLock lock(&mu_);
    std::swap(doomed, values_);
    revoked_ = true;
  }
  bool revoked() const {
    MutexLock lock(&mu_);
    return revoked_;
  }

 private:
  const int64_t label_;
  const int64_t step_;
  const absl::Time made_;
  mutable Mutex mu_;
  mutable BlockArray values_ ABSL_GUARDED_BY(mu_);
  mutable bool revoked_ ABSL_GUARDED_BY(mu_) = false;
};

// The model as one shard has it: the values of its pieces, their optimizer slots, the cuts that
// readers see and the snapshot that becomes a checkpoint. Knows nothing of generations, ranks or
// calls: server/ shard.h decides what happens when.
//
// Values and slots live in blocks (weight_blocks.h). A cut, a snapshot and a reader of live weights
// hold references to the blocks of one version: taking one costs microseconds and copies nothing,
// and the next update writes the blocks so held elsewhere. Readers never hold up
// an update and never see a mixture of versions.
//
// Memory, in copies of the values (V) and of the slots (S), when every element changes with every
// step: 1 V + 1 S live; held_cuts V; 1 V + 1 S for a snapshot whose checkpoint is being written
// (less where it is a held cut, too); 1 V + 1 S for a push that is taken early; max_old_cuts V for
// readers of cuts that are no longer held; max_live_reads V for readers of live weights. Beyond
// these bounds the oldest reader's version is revoked. Blocks that gRPC has not sent yet come on
// top: a few frames a call.
//
// One thread at a time calls the methods that change something (the shard's executor); the const
// ones and Live are thread-safe beside it.
class ShardStore {
 public:
  struct Options {
    ShardMap map;
    int shard = 0;
    OptimizerConfig optimizer;
    int threads = 1;         // of an update; its result does not depend on them
    int held_cuts = 2;       // the newest ones; never fewer than one
    int max_old_cuts = 2;    // cuts no longer held that readers may go on with; at least one
    int max_live_reads = 4;  // versions of the live weights that readers may hold; at least one
    // How long an old version may keep other readers of live weights waiting.
    absl::Duration max_read_age = absl::Seconds(30);
    Clock* clock = Clock::Real();
  };
  // INVALID_ARGUMENT names a parameter group that fits no parameter, or a parameter that is not
  // fp32.
  static absl::StatusOr<std::unique_ptr<ShardStore>> Create(Options options);

  const PieceLayout& layout() const { return layout_; }

  // ---------------------------------------------------------------------------------- loading

  // Version 0: values from the archive's safetensors file, of which `warm_start` (empty: none)
  // replaces those it has. Slots start anew, cuts and snapshot go. Errors name file and tensor.
  absl::Status LoadInitial(const std::string& weights, const std::string& warm_start,
                           FileSystem* file_system);

  // From this shard's file of a checkpoint. DATA_LOSS names file and place. On error the values are
  // unspecified.
  absl::Status LoadCheckpoint(const std::string& path, const CheckpointManifest& manifest,
                              FileSystem* file_system);
  // From a checkpoint of another shard map of the same tensors: another number of shards, or an
  // older rule of placement. The shard's step is the group's. On error the values are unspecified.
  absl::Status LoadResharded(CheckpointTensors* tensors);

  // ---------------------------------------------------------------------------------- training

  // Memory for a push. Thread-safe.
  std::shared_ptr<StagedPush> NewPush(const PushBegin& begin) const;

  struct Update {
    int64_t step = 0;  // the step this makes; numbers the optimizer's bias correction too
    double learning_rate = 0;
    double weight_decay = 0;
    double clip_scale = 1;
    std::vector<TensorNorm> norms = {};  // LARS: of whole tensors
  };
  // Memory for a push that makes `update` all by itself (early_update.h): null where that is not
  // possible, or the values are not those of the step before. Thread-safe.
  std::shared_ptr<StagedPush> NewEarlyPush(const PushBegin& begin, const Update& update);
  bool MayUpdateEarly() const;

  struct Contribution {
    const StagedPush* push = nullptr;
    int64_t num_examples = 0;
  };
  // Makes the next step: parameters that are trained by the optimizer from clip_scale *
  // sum(n_i g_i) / sum(n_i), summed in the order given, buffers by CombineBuffers. Without
  // contributions, or with no examples in them, only the step is counted. To be asked CanApply
  // first: false for a push that was taken for another update.
  bool CanApply(const Update& update, absl::Span<const Contribution> contributions) const;
  void Apply(const Update& update, absl::Span<const Contribution> contributions);

  // Sums of squares over this shard's part of every trained tensor it has any of, of the average
  // that Apply would take and, if `weights`, of the values. In double and in an order that depends
  // on the layout alone. Called by the writer, like Apply.
  std::vector<TensorNorm> Norms(absl::Span<const Contribution> contributions, bool weights) const;

  const Optimizer& optimizer() const { return optimizer_; }

  // Number of updates in the values; during Apply still the old one.
  int64_t step() const;

  // ---------------------------------------------------------------------------------- reading

  // Makes the present values readable as the cut `label`, unless there is one already, and drops
  // the oldest beyond held_cuts.
  void Publish(int64_t label);
  // Null if it is not held (any more).
  std::shared_ptr<const Cut> FindCut(int64_t label) const;
  int64_t newest_cut() const;  // label; -1 = none
  // Forgets all cuts and the snapshot and revokes every version that readers hold.
  void DropCuts();

  // The live weights. With `exact`, those of step `step`: null unless they are there; a version of
  // an older step is revoked where there are too many. Otherwise of at least that step, null if
  // there are none to be had: while an update is under way, or because max_live_reads older
  // versions are being read; then ask again after the next update, or soon.
  std::shared_ptr<const Cut> Live(int64_t step, bool exact);

  // Copies `count` elements of a piece from element `begin` (of the tensor). ABORTED if the cut was
  // revoked.
  absl::Status ReadElements(const Cut& cut, int piece, int64_t begin, int64_t count,
                            void* to) const;

  // What readers of a revoked cut are told: ABORTED.
  static absl::Status RevokedError(const Cut& cut);

  struct Memory {
    uint64_t live_bytes = 0;  // values and slots
    // Held beyond those by cuts, snapshots and readers.
    uint64_t held_bytes = 0;
    uint64_t allocated_bytes = 0;  // by the pool of blocks, in use or not
    int64_t cuts = 0;              // held
    int64_t old_cuts = 0;          // no longer held, but read
    int64_t live_reads = 0;        // versions of live weights that are being read
    int64_t revoked = 0;           // versions taken from their readers, since the start
  };
  Memory memory() const;

  // ------------------------------------------------------------------------------- checkpoints

  // Everything a checkpoint of this shard needs.
  struct Snapshot {
    int64_t label = 0;
    int64_t step = 0;
    BlockArray values;
    std::vector<BlockArray> slots;  // by Optimizer::SlotNames()
  };
  // Keeps the present state for WriteCheckpoint; replaces an older snapshot. Costs microseconds:
  // what changes later is written elsewhere.
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
  uint64_t slot_bytes() const { return layout_.buffer_bytes() * slots_.size(); }
  uint64_t block_bytes() const { return block_bytes_; }
  // Memory for something on its way to a reader, of block_bytes(). Thread-safe.
  BlockRef NewBlock() const { return blocks_.Get(); }

 private:
  // The part of a piece that lies in one block.
  struct Segment {
    int piece = 0;
    int64_t first = 0;    // element, of the piece
    int64_t count = 0;    // elements
    uint64_t offset = 0;  // of the first byte, in the block
  };
  struct BlockLayout {
    std::vector<Segment> segments;
    bool trained = false;  // has parts of parameters, hence slots
    bool changes = false;  // has anything that an update changes
  };
  using Versions = std::vector<std::weak_ptr<const Cut>>;

  // What is the same for all blocks of one update.
  struct Work {
    absl::Span<const Contribution> contributions;
    std::vector<double> weights;         // n_i / sum(n_i)
    std::vector<Optimizer::Step> steps;  // by piece
  };

  ShardStore(Options options, PieceLayout layout, std::vector<ParameterPolicy> policies);
  friend class EarlyUpdate;
  // Takes over what a push of NewEarlyPush has computed.
  void Adopt(const StagedPush& push);
  bool Trains(const ShardPiece& piece) const { return policies_[piece.piece.tensor()].trained; }
  static std::vector<double> Weights(absl::Span<const Contribution> contributions);
  std::vector<Optimizer::Step> StepsOf(const Update& update) const;
  void UpdateBlock(size_t block, const Work& work);
  void UpdateParameter(const ShardPiece& piece, const Segment& segment, const Work& work,
                       const uint8_t* from, uint8_t* to,
                       absl::Span<const uint8_t* const> slots_from,
                       absl::Span<uint8_t* const> slots_to);
  // The average over pushes of `n` elements from byte `in_push`, in `room` where it is not the only
  // push itself.
  static absl::Span<const float> Average(absl::Span<const Contribution> contributions,
                                         absl::Span<const double> weights, uint64_t in_push,
                                         size_t n, float* room);
  void Clear();
  // Makes sure that cuts and snapshots come without fresh pages.
  void ReserveCuts();
  // Calls use(block, offset in it, element of the piece, elements) for each part of a range of a
  // piece, in order.
  template <typename Use>
  void ForSegments(const ShardPiece& piece, int64_t begin, int64_t count, Use use) const;
  // The next contents come from outside: every block becomes this array's own.
  void MakeUnique(BlockArray* array);

  static void Prune(Versions* versions);
  void RevokeOldest(Versions* versions, size_t keep) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  const PieceLayout layout_;
  const std::vector<ParameterPolicy> policies_;  // by tensor
  const Optimizer optimizer_;
  const std::vector<std::string> slot_names_;
  const uint64_t block_bytes_;
  mutable BufferPool pool_;   // of staged pushes
  mutable BlockPool blocks_;  // of values and slots, and of what is sent of them in another form
  std::vector<BlockLayout> block_layouts_;

  // Touched by the writer only while updating_, and by others only while not, under mu_.
  BlockArray values_;
  std::vector<BlockArray> slots_;

  mutable Mutex mu_;
  int64_t step_ ABSL_GUARDED_BY(mu_) = 0;
  bool updating_ ABSL_GUARDED_BY(mu_) = false;
  std::map<int64_t, std::shared_ptr<const Cut>> cuts_ ABSL_GUARDED_BY(mu_);
  Versions old_cuts_ ABSL_GUARDED_BY(mu_);    // dropped from cuts_; oldest first
  Versions live_reads_ ABSL_GUARDED_BY(mu_);  // oldest first
  std::shared_ptr<const Snapshot> snapshot_ ABSL_GUARDED_BY(mu_);
  int64_t revoked_ ABSL_GUARDED_BY(mu_) = 0;
};

template <typename Use>
void ShardStore::ForSegments(const ShardPiece& piece, int64_t begin, int64_t count, Use use) const {
  // Offsets of pieces and ends of blocks are multiples of every element's size.
  while (count > 0) {
    const uint64_t at = piece.offset + static_cast<uint64_t>(begin) * piece.element_size;
    const uint64_t offset = at % block_bytes_;
    const int64_t room = static_cast<int64_t>((block_bytes_ - offset) / piece.element_size);
    const int64_t n = std::min(count, room);
    use(static_cast<size_t>(at / block_bytes_), offset, begin, n);
    begin += n;
    count -= n;
  }
}

}  // namespace codistill

#endif  // CODISTILL_SERVER_SHARD_STORE_H_
