#ifndef CODISTILL_COMMON_MODEL_FOLLOWED_MODEL_H_
#define CODISTILL_COMMON_MODEL_FOLLOWED_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/model.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// A model whose weights come from elsewhere and may be replaced by newer ones at any time: a
// group's published cuts (Create, below), files (frozen_model.h), or several such models as one
// (ensemble_model.h). Used by prediction servers, the evaluator, and workers that compute their
// teachers' predictions themselves. Thread-safe.
//
// A new version is loaded into a spare copy of the model, verified, rounded to the precision that
// is wanted and warmed up (prepare_model.h) before it takes the old one's place, by an exchange of
// pointers that nobody waits for. The old one's memory is loaded into again once its last user has
// let go. What cannot be loaded or is not good is refused, counted and named in `counters`, while
// the held version stays. A version of another generation replaces all held ones.
//
// Where the job has embedding tables, a copy of them is kept up too; the snapshot's Predict then
// takes keys, as data and requests bring them, and looks the rows up.
class FollowedModel {
 public:
  // One complete version; immutable while held. Holding it long delays the reuse of its memory, no
  // more.
  struct Snapshot {
    std::shared_ptr<const Model> model;
    Version version;
    absl::Time loaded_at;
    // Of its answers: that to which its weights were rounded, or of its passes where that is less.
    DataType precision = DT_FLOAT;
  };

  struct Options {
    JobConfig job;
    int group = 0;  // index in job.groups
    int threads = 1;
    // Load only cuts for which this is true, and each of them: the next one takes the held one's
    // place only after WaitForNewer has returned that (unless shards no longer have it), and one
    // whose weights are not finite is not refused, because whoever asks for a certain cut is to
    // judge it. Null = the newest, whichever it is.
    std::function<bool(int64_t step)> wants;
    // How parameters travel: DT_FLOAT, or DT_BFLOAT16 (rounded to nearest even, half the bytes).
    DataType transfer_dtype = DT_FLOAT;
    // To which parameters of two or more dimensions are rounded once they have come: DT_FLOAT,
    // DT_BFLOAT16 or DT_INT8 (RoundWeights). Passes compute in fp32.
    DataType weights = DT_FLOAT;
    // Versions kept, the newest included.
    int held_versions = 1;
    // Load behind the process's other threads (LowerThreadPriority), as those must that answer
    // requests meanwhile.
    bool low_priority = false;
    // As Model::Options; and versions are compiled for their weights where that makes passes faster
    // (ModelCompiler).
    bool optimize_predict = false;
    std::string device = "cpu";  // as Model::Options; each version is there once
    Precision precision = FP32;  // of passes, as Model::Options::predict_precision
  };
  // Follows a group: watches its leader and pulls each new cut from its shards. Loads the archive;
  // following starts at once in the background and survives any loss of the group. How a damaged
  // cut shows: what a shard sends must be exactly its pieces of the tensors, whole and in order,
  // under the digest of the shard map (DATA_LOSS names the tensor); bytes changed on their way are
  // the transport's to find (TCP's checksum; shared memory has none), and what is left is held
  // against CheckWeights.
  static absl::StatusOr<std::unique_ptr<FollowedModel>> Create(Options options);
  virtual ~FollowedModel() = default;

  // The held version; UNAVAILABLE before the first cut was loaded (the message says what is
  // awaited).
  virtual absl::StatusOr<std::shared_ptr<const Snapshot>> Get() const = 0;

  // All versions that are held, newest first: more than one where older ones are kept for requests
  // that name them.
  virtual std::vector<std::shared_ptr<const Snapshot>> Held() const {
    auto newest = Get();
    if (!newest.ok()) return {};
    return {*std::move(newest)};
  }

  // Waits until a version newer than (generation, step) is held, or until `deadline`
  // (DEADLINE_EXCEEDED).
  virtual absl::StatusOr<std::shared_ptr<const Snapshot>> WaitForNewer(const Version& than,
                                                                       absl::Time deadline) = 0;

  // Newest state of the group as last told by its leader, and how long ago that was.
  virtual GroupState group_state() const = 0;
  virtual absl::Duration group_silence() const = 0;
  // Step the group has come to, as far as can be known: where its leader has fallen silent, more
  // than it said last (StepEstimate), so that staleness is never told too small.
  virtual int64_t group_step() const { return group_state().version().step(); }

  struct Counters {
    int64_t swaps = 0;
    int64_t failed_loads = 0;
    uint64_t pull_bytes = 0;
    std::string last_load_error;  // why the newest version is not held; empty once it is
  };
  virtual Counters counters() const = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_FOLLOWED_MODEL_H_
