#ifndef CODISTILL_PREDSERVER_CACHED_ROWS_H_
#define CODISTILL_PREDSERVER_CACHED_ROWS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "common/tensor/tensor.h"
#include "predserver/prediction_cache.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// The predictions of one request as they come together: some found in the cache, some waited for
// while others compute them, and the rest computed. Never of two generations. Not thread-safe.
class CachedRows {
 public:
  // `cache` is not owned. `columns`: of the logits.
  CachedRows(PredictionCache* cache, std::vector<int64_t> ids, int64_t columns);
  // Ends its claims.
  ~CachedRows();
  CachedRows(const CachedRows&) = delete;
  CachedRows& operator=(const CachedRows&) = delete;

  enum class Next {
    kAnswer,   // all are there
    kCompute,  // those in compute()
    kWait,     // others are computing all that is missing
  };
  // Looks for what is missing, of this generation and step or a newer one. Rows found before of
  // another generation are forgotten. Counts what it found and what is to be computed.
  Next Look(uint64_t generation, int64_t least_step, int64_t* hits, int64_t* misses);
  // Indices of examples, ascending; empty after Look said kCompute: all.
  const std::vector<int32_t>& compute() const { return compute_; }

  // After kWait: from the result's Start on, `go` is called once the others have computed what is
  // missing, or given up. Of what is missing then, one of those who waited computes each example
  // and the others wait again, but not for ever: after kMostWaits everyone computes for itself.
  std::shared_ptr<PredictionCache::Waiter> Wait(std::function<void()> go);

  // Takes the logits of the examples of compute(), and gives those that are finite to the cache:
  // what one client's inputs have driven out of bounds is for that client only. False if they do
  // not go with those found, and everything must be computed anew. The claims remain.
  bool Take(const Tensor& logits, const Version& version, absl::Time loaded_at);
  // Ends the claims: others go on with what the cache has now, and compute the rest.
  void GiveUp();

  bool complete() const { return missing_ == 0; }
  // [rows, columns], once complete. Computed by this version or newer ones of its generation.
  const Tensor& logits() const { return logits_; }
  const PredictionCache::Origin& oldest() const { return oldest_; }
  uint64_t generation() const { return generation_; }
  // Memory that this takes.
  int64_t bytes() const {
    return static_cast<int64_t>(ids_.size() * sizeof(int64_t)) +
           (logits_.empty() ? 0 : static_cast<int64_t>(logits_.bytes()));
  }

 private:
  static constexpr int kMostWaits = 4;
  PredictionCache::Key KeyOf(int32_t example) const { return {ids_[example], generation_}; }
  float* RowOf(int32_t example);
  void Found(int32_t example, const PredictionCache::Origin& origin);
  void Forget(uint64_t generation);

  PredictionCache* const cache_;
  const std::vector<int64_t> ids_;
  const int64_t columns_;
  uint64_t generation_ = 0;
  std::vector<bool> found_;
  int64_t missing_;
  Tensor logits_;
  int64_t row_floats_ = 0;  // of logits_
  PredictionCache::Origin oldest_;
  int waits_ = 0;
  std::vector<int32_t> compute_;
  std::vector<PredictionCache::Key> claims_;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_CACHED_ROWS_H_
