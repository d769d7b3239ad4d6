#include "server/push_ledger.h"

#include <algorithm>

namespace codistill {

AsyncLedger::AsyncLedger(int num_workers, int num_shards)
    : num_shards_(num_shards), ranks_(num_workers) {
  for (Rank& rank : ranks_) {
    rank.newest.assign(num_shards, Key(0, 0));
    rank.written.assign(num_shards, Key(0, 0));
  }
}

void AsyncLedger::Issued(int32_t rank, uint64_t incarnation, int64_t step) {
  Push& push = ranks_[rank].open[{incarnation, step}];
  push.outcomes.assign(num_shards_, PUSH_OUTCOME_INVALID);
  counters_.set_issued(counters_.issued() + 1);
}

void AsyncLedger::Decided(int32_t rank_index, uint64_t incarnation, int64_t step, int shard,
                          PushOutcome outcome) {
  Rank& rank = ranks_[rank_index];
  const Key key(incarnation, step);
  if (key <= rank.newest[shard]) return;  // a report that was sent twice
  rank.newest[shard] = key;
  // An earlier leader handed it out, and the count of that is not in what we took up.
  if (rank.open.count(key) == 0) Issued(rank_index, incarnation, step);
  rank.open[key].outcomes[shard] = outcome;
  Settle(&rank);
}

void AsyncLedger::ShardLost(int shard) {
  for (Rank& rank : ranks_) {
    if (!rank.open.empty()) {
      // Only what was under way then: a step that is handed out but has not been sent may still
      // meet the shard's next process.
      for (const auto& item : rank.open) {
        const bool begun =
            std::any_of(item.second.outcomes.begin(), item.second.outcomes.end(),
                        [](PushOutcome outcome) { return outcome != PUSH_OUTCOME_INVALID; });
        if (begun) rank.written[shard] = std::max(rank.written[shard], item.first);
      }
    }
    Settle(&rank);
  }
}

void AsyncLedger::Abandon() {
  for (Rank& rank : ranks_) {
    for (const auto& item : rank.open) Count(item.second);
    rank.open.clear();
    // Ranks keep their incarnations and count their steps anew.
    rank.newest.assign(num_shards_, Key(0, 0));
    rank.written.assign(num_shards_, Key(0, 0));
  }
}

void AsyncLedger::Settle(Rank* rank) {
  while (!rank->open.empty()) {
    const auto first = rank->open.begin();
    for (int shard = 0; shard < num_shards_; ++shard) {
      if (first->second.outcomes[shard] == PUSH_OUTCOME_INVALID &&
          std::max(rank->newest[shard], rank->written[shard]) < first->first) {
        return;  // it may still come
      }
    }
    Count(first->second);
    rank->open.erase(first);
  }
}

void AsyncLedger::Count(const Push& push) {
  const auto decided = [&](PushOutcome outcome) {
    return std::count(push.outcomes.begin(), push.outcomes.end(), outcome);
  };
  AsyncCounters& c = counters_;
  const int64_t applied = decided(APPLIED);
  if (applied == num_shards_) {
    c.set_whole(c.whole() + 1);
  } else if (applied > 0) {
    c.set_partial(c.partial() + 1);
    c.set_partial_updates(c.partial_updates() + applied);
  } else if (decided(REJECTED) > 0) {
    c.set_rejected(c.rejected() + 1);
  } else if (decided(TOO_STALE) > 0) {
    c.set_too_stale(c.too_stale() + 1);
  } else if (decided(DROPPED_LATE) > 0) {
    c.set_dropped(c.dropped() + 1);
  } else {
    c.set_lost(c.lost() + 1);
  }
}

int64_t AsyncLedger::open() const {
  int64_t open = 0;
  for (const Rank& rank : ranks_) open += static_cast<int64_t>(rank.open.size());
  return open;
}

void AsyncLedger::Fill(AsyncCounters* counters) const {
  *counters = counters_;
  counters->set_open(open());
}

void AsyncLedger::Load(const AsyncCounters& saved) {
  counters_ = saved;
  counters_.set_lost(saved.lost() + saved.open());
  counters_.clear_open();
  for (Rank& rank : ranks_) rank.open.clear();
}

}  // namespace codistill
