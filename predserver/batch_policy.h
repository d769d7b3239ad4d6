#ifndef CODISTILL_PREDSERVER_BATCH_POLICY_H_
#define CODISTILL_PREDSERVER_BATCH_POLICY_H_

#include <cstdint>
#include <deque>

#include "absl/time/time.h"

namespace codistill {

// When a forward pass starts, and when it waits for more requests to share it.
//
// Waiting pays only for requests that will come. Clients that wait for their answers before they
// ask again show how many there are: the most requests that were open at once during the last few
// passes. A pass waits until so many are together (those being computed elsewhere count: their
// clients cannot come), until the batch is full, or until none has come for `delay`, four times
// that in all; a client that is alone finds nobody to wait for. After waits in which nobody came,
// passes start without, for a while.
//
// Not thread-safe.
class BatchPolicy {
 public:
  struct Options {
    int64_t max_examples = 256;  // of a pass
    absl::Duration delay = absl::Milliseconds(1);
  };
  explicit BatchPolicy(Options options) : options_(options) {}

  // A request has been accepted / so many have been answered.
  void Came(absl::Time now);
  void Answered(int requests, absl::Time now);

  // With these in the queue, one at least: InfinitePast if a pass should start now, else the time
  // until which it may wait for more.
  absl::Time StartAt(int requests, int64_t examples, absl::Time now);
  // As far as can be said without starting a wait.
  bool Enough(int requests, int64_t examples) const;
  bool waiting() const { return wait_until_ != absl::InfiniteFuture(); }

  // A pass starts with `requests` of those waiting, and so will one with `others` of them at once.
  void Started(int requests, int others = 0);
  // A pass has ended; what it computed is not answered yet.
  void Computed(int requests) { computing_ -= requests; }
  // There is nothing in the queue any more.
  void StopWaiting() {
    wait_until_ = absl::InfiniteFuture();
    others_ = 0;
  }

 private:
  static constexpr size_t kRemembered = 4;  // passes
  static constexpr int kMostWithoutWait = 64;
  static constexpr int kMostDelays = 4;  // of one wait

  int Expected() const;
  // The wait is over; `by_time` without as many as were expected.
  void EndWait(int requests, bool by_time);

  const Options options_;
  int open_ = 0;           // accepted and not answered
  int computing_ = 0;      // of them, in passes
  std::deque<int> peaks_;  // of open_, between one pass and the next; the last is of now
  absl::Time idle_since_ = absl::InfinitePast();
  absl::Time wait_until_ = absl::InfiniteFuture();
  int others_ = 0;        // that start without another wait
  int delays_ = 0;        // of this wait, so far
  int seen_ = 0;          // requests, when the last of them began
  int waited_with_ = 0;   // requests, when the wait began
  int without_wait_ = 0;  // passes yet to start without
  int patience_ = 0;      // doublings of that after the next vain wait
};

// How fast a model answers, from its last passes, and when those it must refuse should come again.
// Not thread-safe.
class DrainRate {
 public:
  // A pass has answered `requests`, the first of which had come at `waiting_since`.
  void Passed(int requests, absl::Time waiting_since, absl::Time now);

  // Requests a second while there are any; 0 before the first pass.
  double per_second() const { return seconds_ > 0 ? requests_ / seconds_ : 0; }

  // For a refused request, with `queued` waiting: one refused after the other is given the next
  // place that will become free, at the measured rate, and after as many as the queue holds the
  // first again. Between 1 ms and 10 s.
  absl::Duration RetryDelay(int queued, absl::Time now);

 private:
  // Of the last second or so of computing.
  double requests_ = 0;
  double seconds_ = 0;
  absl::Time last_ = absl::InfinitePast();
  absl::Time promised_ = absl::InfinitePast();
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_BATCH_POLICY_H_
