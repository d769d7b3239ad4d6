#include "server/push_counts.h"

namespace codistill {

void PushTally::Answered(int32_t rank, const absl::StatusOr<PushReply>& reply) {
  PushCounts& counts = Of(rank);
  switch (reply.ok() ? reply->outcome() : PUSH_OUTCOME_INVALID) {
    case APPLIED:
      return counts.set_applied(counts.applied() + 1);
    case DROPPED_LATE:
      return counts.set_dropped_late(counts.dropped_late() + 1);
    case TOO_STALE:
      return counts.set_too_stale(counts.too_stale() + 1);
    case REJECTED:
      return counts.set_rejected(counts.rejected() + 1);
    case DUPLICATE:
      return counts.set_duplicate(counts.duplicate() + 1);
    default:
      return counts.set_refused(counts.refused() + 1);
  }
}

void PushTally::Fill(google::protobuf::RepeatedPtrField<RankPushes>* ranks) const {
  for (const auto& [rank, counts] : ranks_) {
    RankPushes* const out = ranks->Add();
    out->set_rank(rank);
    PushCounts& c = *out->mutable_counts();
    c = counts;
    c.set_open(c.begun() - c.applied() - c.dropped_late() - c.too_stale() - c.rejected() -
               c.duplicate() - c.refused() - c.lost());
  }
}

void PushTotals::Update(int shard, uint64_t nonce,
                        const google::protobuf::RepeatedPtrField<RankPushes>& ranks) {
  Shard& s = shards_[shard];
  if (s.nonce != nonce) {
    for (auto& [rank, counts] : s.counts) {
      counts.set_lost(counts.lost() + counts.open());
      counts.clear_open();
      AddPushCounts(counts, &s.earlier[rank]);
    }
    s.counts.clear();
    s.nonce = nonce;
  }
  for (const RankPushes& rank : ranks) s.counts[rank.rank()] = rank.counts();
}

std::map<int32_t, PushCounts> PushTotals::Totals() const {
  std::map<int32_t, PushCounts> totals;
  for (const Shard& shard : shards_) {
    for (const auto& [rank, counts] : shard.earlier) AddPushCounts(counts, &totals[rank]);
    for (const auto& [rank, counts] : shard.counts) AddPushCounts(counts, &totals[rank]);
  }
  return totals;
}

void AddPushCounts(const PushCounts& more, PushCounts* sum) {
  sum->set_begun(sum->begun() + more.begun());
  sum->set_applied(sum->applied() + more.applied());
  sum->set_dropped_late(sum->dropped_late() + more.dropped_late());
  sum->set_too_stale(sum->too_stale() + more.too_stale());
  sum->set_rejected(sum->rejected() + more.rejected());
  sum->set_duplicate(sum->duplicate() + more.duplicate());
  sum->set_refused(sum->refused() + more.refused());
  sum->set_lost(sum->lost() + more.lost());
  sum->set_open(sum->open() + more.open());
}

}  // namespace codistill
