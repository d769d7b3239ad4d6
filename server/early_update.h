#ifndef CODISTILL_SERVER_EARLY_UPDATE_H_
#define CODISTILL_SERVER_EARLY_UPDATE_H_

#include <memory>
#include <vector>

#include "server/shard_store.h"
#include "server/staged_push.h"
#include "server/weight_blocks.h"

namespace codistill {

// The step that a push makes if it is the only one of its step, computed while it arrives: each
// gradient is taken off the wire straight into new weights and slots beside the old ones, instead
// of being put aside and read again once the step is decided. That saves a write and a read of the
// whole model, and leaves nothing to compute after the last byte. Nobody sees these weights before
// the decision, which then puts their blocks in the place of the old ones; a push that is not taken
// is forgotten with its blocks.
//
// For steps that nothing but this push can change: ShardStore::MayUpdateEarly says for which
// updates, and the shard for which groups. The gradient itself is not kept, so that a decision for
// another update (which only a leader with another job could take) must be refused: see Fits.
//
// Written by one call at a time; the base stays as it is, since its blocks are held.
class EarlyUpdate final : public PushSink {
 public:
  // All blocks of the values, and of every slot; none where nothing has arrived.
  struct State {
    std::vector<BlockRef> values;
    std::vector<std::vector<BlockRef>> slots;
  };
  // `base`: the state of step update.step - 1.
  EarlyUpdate(const ShardStore* store, ShardStore::Update update, State base, BlockPool* blocks);

  void Take(int piece, int64_t first, int64_t count, CopyOut copy, ViewOut view) override;

  // Whether `update` is the one that was computed.
  bool Fits(const ShardStore::Update& update) const;

 private:
  friend class ShardStore;

  // Makes sure that a block has a new state.
  void Open(size_t block);
  void Train(int piece, size_t block, uint64_t offset, int64_t count, const void* gradient);

  const ShardStore* const store_;
  const ShardStore::Update update_;
  const std::vector<Optimizer::Step> steps_;  // by piece
  BlockPool* const blocks_;
  // Until the step is taken.
  State base_;
  State next_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EARLY_UPDATE_H_
