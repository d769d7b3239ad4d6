#ifndef CODISTILL_SERVER_WORKER_CLOCKS_H_
#define CODISTILL_SERVER_WORKER_CLOCKS_H_

#include <cstdint>
#include <vector>

namespace codistill {

// How far the workers of an asynchronous group have come, each by its own count of steps, as the
// leader knows it: the clocks of the stale synchronous parallel model (Ho et al., "More effective
// distributed ML via a stale synchronous parallel parameter server", 2013).
//
// A step of a rank is over when every shard has decided it or a later one of that rank, or when its
// worker has said so (a push that failed is given up). What is known lags behind what is, so a
// bound that holds for these clocks holds for the workers. Clocks never go back. Not thread-safe.
class WorkerClocks {
 public:
  // All ranks count, from step 0.
  WorkerClocks(int num_workers, int num_shards);

  // The rank counts, and its steps up to `step` are over: a process has taken it and will begin
  // with the next one.
  void Join(int32_t rank, int64_t step);
  // The rank no longer counts (its lease has ended) until it joins again.
  void Leave(int32_t rank);
  bool counts(int32_t rank) const { return clocks_[rank].counts; }

  // `shard` has decided a push of `rank` for its own step `step`.
  void Decided(int32_t rank, int shard, int64_t step);
  // The worker is done with its steps up to `step`.
  void Over(int32_t rank, int64_t step);

  int64_t completed(int32_t rank) const { return clocks_[rank].completed; }
  // The smallest clock of those that count; the largest clock of all if none does.
  int64_t Slowest() const { return slowest_; }
  // The last step any rank may begin: max_staleness ahead of the slowest.
  int64_t Limit(int64_t max_staleness) const { return slowest_ + max_staleness + 1; }
  // The rank that holds the others up: the first of the slowest; -1 = none counts.
  int32_t SlowestRank() const;

 private:
  struct Clock {
    bool counts = true;
    int64_t completed = 0;
    std::vector<int64_t> decided;  // by shard
  };
  void Update();

  std::vector<Clock> clocks_;
  int64_t slowest_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_WORKER_CLOCKS_H_
