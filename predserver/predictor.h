#ifndef CODISTILL_PREDSERVER_PREDICTOR_H_
#define CODISTILL_PREDSERVER_PREDICTOR_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/base/clock.h"
#include "common/base/mutex.h"
#include "common/metrics/metrics.h"
#include "common/model/followed_model.h"
#include "predserver/batch_policy.h"
#include "predserver/batch_run.h"
#include "predserver/compute_pool.h"
#include "predserver/model_statistics.h"
#include "predserver/prediction.h"
#include "predserver/prediction_cache.h"
#include "predserver/prediction_metrics.h"
#include "predserver/request_check.h"
#include "predserver/request_queue.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"

namespace codistill {

// Answers prediction requests with a followed model: checks each, queues it (RequestQueue), and
// computes it together with others in one forward pass (BatchPolicy) on the threads of a
// ComputePool. All requests of a pass are answered by one version of the model, which their answers
// name.
//
// With a cache, a request that brings example ids and names no version is answered, example by
// example, with what was computed for the same ids before by the held version or one at most
// cache_window_steps older of the same generation; only the rest is computed. Its answer names the
// oldest version of all its examples, and staleness and age are that version's.
//
// Knows nothing of gRPC. Thread-safe; nothing blocks but Drain.
class Predictor {
 public:
  struct Options {
    std::string model;  // name that requests give: the group or teacher
    ModelConfig config;
    const FollowedModel* followed = nullptr;       // not owned, outlives the predictor
    int max_queue = 256;                           // requests that wait
    int64_t max_queue_bytes = int64_t{256} << 20;  // of them, with all that they hold
    int64_t max_batch_size = 256;                  // examples of one pass
    absl::Duration max_batch_delay = absl::Milliseconds(1);
    // Memory of the cache of predictions by example id; 0: none. Not for recurrent models.
    int64_t cache_bytes = 0;
    int64_t cache_window_steps =
        100;                      // that a cached prediction may be older than the held version
    OutputLimits outputs;         // of one request
    ComputePool* pool = nullptr;  // not owned, outlives the predictor
    Metrics* metrics = nullptr;   // not owned, outlives the predictor; may be null
    Clock* clock = Clock::Real();
  };
  // The limits that a job sets.
  static Options FromConfig(const PredictionConfig& config);
  static absl::StatusOr<std::unique_ptr<Predictor>> Create(Options options);
  // Drain().
  ~Predictor();

  using Done = std::function<void(absl::StatusOr<Prediction>)>;
  // Calls `done` exactly once: at once where the request is refused or a small answer to it is in
  // the cache, else from a thread of the pool. Codes as in proto/open_inference.proto; CANCELLED
  // where the caller was gone before compute. Where there is no room, RESOURCE_EXHAUSTED with the
  // delay after which there will be (RetryAfter).
  void Predict(PredictionRequest request, Done done);

  // What Predict would refuse for want of room, before a request of so many bytes is even taken
  // apart. Counts as a request if it is refused. (What is in the cache needs no room: with one,
  // requests are refused here only while the queue is full and so is the room of those who wait for
  // what others compute.)
  absl::Status CheckRoom(const std::string& client, int64_t bytes);

  // OK if `version` (empty: any) is held. Else NOT_FOUND or UNAVAILABLE (also while draining).
  absl::Status Ready(const std::string& version) const;
  // "generation.step", newest first.
  std::vector<std::string> held_versions() const;
  const ModelConfig& config() const { return options_.config; }
  const std::string& model() const { return options_.model; }
  int64_t max_batch_size() const { return options_.max_batch_size; }

  ModelStatistics statistics() const { return metrics_.statistics(); }
  void FillStatus(ServedModelStatus* status) const;
  // Answers a second over the last few seconds.
  double Rate() const { return metrics_.Rate(options_.clock->Now()); }
  // How far behind its group the newest version is, or why there is none; one line.
  std::string Detail() const;

  bool draining() const {
    MutexLock lock(&mu_);
    return draining_;
  }
  // Refuses new requests with UNAVAILABLE and returns when all accepted ones are answered.
  // Idempotent.
  void Drain();

 private:
  using Item = RequestQueue::Item;
  using Snapshot = std::shared_ptr<const FollowedModel::Snapshot>;
  struct Failed {
    Item item;
    absl::Status status;
  };
  // What one visit of a pool's thread takes out of the queue.
  struct Taken {
    Snapshot snapshot;
    std::vector<Item> items;
    std::vector<Failed> failed;
  };

  explicit Predictor(Options options);
  static absl::Status Draining();
  // OK, and then cheap, or why nobody waits for the answer any more.
  static absl::Status StillWanted(const WaitingRequest& item, absl::Time now);
  // With so many waiting where there is no room.
  absl::Status Refusal(size_t waiting, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether there is a place in the queue; `taken` gets those whose dead requests gave it up.
  bool FindRoom(const std::string& client, int64_t bytes, absl::Time now, Taken* taken)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The same for those who wait outside the queue, `waiting` where it would.
  bool HasRoomAside(size_t waiting, int64_t bytes) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static int64_t BytesOf(const WaitingRequest& item);
  void RemoveDead(absl::Time now, Taken* taken) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TakeBatch(const ComputePool::Situation& situation, absl::Time now, Taken* taken)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The version that answers a request.
  absl::StatusOr<Snapshot> Choose(const PredictionRequest& request) const;
  ComputePool::Offer Next(const ComputePool::Situation& situation);
  // A request that has been checked goes into the queue, or one with cached rows on its way.
  void Enqueue(Item item);
  void Proceed(Item item);
  void Park(Item item);
  void Resume(uint64_t parked);
  void ProceedWithResumed();
  // A request that is complete, by size.
  void AnswerCached(Item item, DataType precision);
  void Compute(Taken* taken);
  // Of a pass that is about to begin, those whose outputs are more than was known when they came.
  void RefuseTooLarge(Taken* taken);
  absl::StatusOr<Prediction> MakePrediction(const WaitingRequest& item, const Computed& computed,
                                            const Version& version, absl::Time loaded_at,
                                            DataType precision) const;
  absl::StatusOr<Prediction> MakeCached(const WaitingRequest& item, DataType precision) const;
  // Newest step that the group has committed, as last told; never less than the held one (after a
  // restore the group may be behind what it published before).
  int64_t LatestStep(const Version& held) const;
  void FinishFailed(std::vector<Failed> failed);
  void Finish(Item item, absl::StatusOr<Prediction> result);
  void Left(int requests);  // unanswered_

  const Options options_;
  const std::unique_ptr<PredictionCache> cache_;  // may be null
  mutable Mutex mu_;
  RequestQueue queue_ ABSL_GUARDED_BY(mu_);
  BatchPolicy policy_ ABSL_GUARDED_BY(mu_);
  DrainRate rate_ ABSL_GUARDED_BY(mu_);
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  int unanswered_ ABSL_GUARDED_BY(mu_) = 0;  // accepted requests, and calls that need entry_
  // Those that wait for others to compute what they ask, by the order in which they came.
  absl::flat_hash_map<uint64_t, Item> parked_ ABSL_GUARDED_BY(mu_);
  uint64_t parked_so_far_ ABSL_GUARDED_BY(mu_) = 0;
  // Those of them who need wait no longer: the pool's threads look after them.
  std::deque<Item> resumed_ ABSL_GUARDED_BY(mu_);
  // Those whose predictions were all in the cache and are only to be put into their format, which
  // for many classes takes as long as a pass. They and the queue take turns.
  struct Complete {
    Item item;
    DataType precision = DT_FLOAT;
  };
  std::deque<Complete> complete_ ABSL_GUARDED_BY(mu_);
  bool complete_next_ ABSL_GUARDED_BY(mu_) = true;
  int64_t aside_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // of the three
  absl::Time swept_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  // Rows of logits of one example; 0 until a pass has shown it.
  std::atomic<int64_t> rows_per_example_{0};
  PredictionMetrics metrics_;
  Mutex drain_mu_;
  ComputePool::Entry* entry_ = nullptr;  // of the pool; null once drained
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_PREDICTOR_H_
