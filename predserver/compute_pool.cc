#include "predserver/compute_pool.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/executor.h"

namespace codistill {

struct ComputePool::Entry {
  Source source;
  bool asking = false;
  bool leaving = false;
  absl::Time again = absl::InfiniteFuture();
  int inside = 0;        // threads in the source or a pass of it
  absl::Duration used;   // time of its passes, those under way with what they will likely take
  absl::Duration usual;  // of a pass
  int64_t last_started = 0;
};

absl::StatusOr<std::unique_ptr<ComputePool>> ComputePool::Create(Options options) {
  if (options.threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("prediction.compute_threads is ", options.threads, "; it must be at least 1"));
  }
  return std::unique_ptr<ComputePool>(new ComputePool(std::move(options)));
}

ComputePool::ComputePool(Options options) : options_(std::move(options)) {
  for (int i = 0; i < options_.threads; ++i) threads_.emplace_back([this, i] { Run(i); });
}

ComputePool::~ComputePool() {
  {
    MutexLock lock(&mu_);
    closing_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

ComputePool::Entry* ComputePool::Join(Source source) {
  MutexLock lock(&mu_);
  Entry& entry = entries_.emplace_back();
  entry.source = std::move(source);
  return &entry;
}

void ComputePool::Leave(Entry* entry) {
  MutexLock lock(&mu_);
  entry->leaving = true;
  if (entry->asking) --asking_;
  entry->asking = false;
  entry->again = absl::InfiniteFuture();
  const auto left = [entry] { return entry->inside == 0; };
  mu_.Await(absl::Condition(&left));
  entries_.remove_if([entry](const Entry& other) { return &other == entry; });
}

void ComputePool::Wake(Entry* entry) {
  MutexLock lock(&mu_);
  if (entry->asking || entry->leaving) return;
  entry->asking = true;
  ++asking_;
  entry->used = std::max(entry->used, now_used_);
}

ComputePool::Entry* ComputePool::Pick(absl::Time now) {
  Entry* best = nullptr;
  for (Entry& entry : entries_) {
    if (!entry.asking && entry.again > now) continue;
    if (best == nullptr || entry.used < best->used ||
        (entry.used == best->used && entry.last_started < best->last_started)) {
      best = &entry;
    }
  }
  return best;
}

bool ComputePool::Wanted(int64_t timers) const {
  return closing_ || asking_ > 0 || timers_ != timers;
}

void ComputePool::Spin(int64_t timers, absl::Time until) {
  spinning_ = true;
  while (!Wanted(timers) && options_.clock->Now() < until) {
    mu_.Unlock();
    sched_yield();
    mu_.Lock();
  }
  spinning_ = false;
}

void ComputePool::WaitForWork() {
  const absl::Time start = options_.clock->Now();
  absl::Time until = absl::InfiniteFuture();
  for (const Entry& entry : entries_) until = std::min(until, entry.again);
  const int64_t timers = timers_;
  const auto wanted = [this, timers]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return Wanted(timers); };
  ++idle_;
  if (soon_ && !spinning_) Spin(timers, std::min(until, start + options_.spin));
  options_.clock->AwaitWithDeadline(&mu_, absl::Condition(&wanted), until);
  --idle_;
  soon_ = asking_ > 0 && options_.clock->Now() - start <= options_.spin;
}

void ComputePool::Serve(Entry* entry) {
  if (entry->asking) --asking_;
  entry->asking = false;
  entry->again = absl::InfiniteFuture();
  entry->used = std::max(entry->used, now_used_);
  now_used_ = entry->used;
  entry->last_started = ++started_;
  ++entry->inside;
  Situation situation;
  // Those with work before them are idle for a moment only.
  situation.idle_threads = std::max(0, idle_ - asking_);
  situation.others_waiting = asking_ > 0;
  mu_.Unlock();
  Offer offer = entry->source(situation);
  mu_.Lock();
  if (offer.pass != nullptr) {
    if (offer.more && !entry->asking && !entry->leaving) {
      entry->asking = true;
      ++asking_;
    }
    const absl::Duration likely = entry->usual;
    entry->used += likely;
    mu_.Unlock();
    const absl::Time start = options_.clock->Now();
    offer.pass();
    offer.pass = nullptr;  // and what it holds, before the source may leave
    const absl::Duration took = std::max(absl::ZeroDuration(), options_.clock->Now() - start);
    mu_.Lock();
    entry->used += took - likely;
    entry->usual += (took - entry->usual) / 4;
  } else if (offer.again < entry->again && !entry->leaving) {
    entry->again = offer.again;
    ++timers_;
  }
  --entry->inside;
}

void ComputePool::Run(int index) {
  SetThreadName(absl::StrCat(options_.name, "/", index));
  MutexLock lock(&mu_);
  while (!closing_) {
    const absl::Time now = options_.clock->Now();
    if (Entry* entry = Pick(now)) {
      Serve(entry);
    } else {
      WaitForWork();
    }
  }
}

}  // namespace codistill
