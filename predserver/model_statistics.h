#ifndef CODISTILL_PREDSERVER_MODEL_STATISTICS_H_
#define CODISTILL_PREDSERVER_MODEL_STATISTICS_H_

#include <cstdint>
#include <map>

#include "absl/time/time.h"

namespace codistill {

// What a model has done since its server started, over all its versions: what ModelStatistics of
// the Open Inference Protocol tells.
struct ModelStatistics {
  // How often something was done, and how long it took in all.
  struct Total {
    int64_t count = 0;
    absl::Duration time;

    void Add(absl::Duration took, int64_t times = 1) {
      count += times;
      time += took;
    }
  };

  // Requests, from arrival to answer.
  Total success;
  Total fail;
  // Requests that were computed: in the queue; then, each with the time of its whole pass, putting
  // the inputs together, the forward pass, and making the outputs.
  Total queue;
  Total compute_input;
  Total compute_infer;
  Total compute_output;
  // Examples answered from the cache / looked for in vain, with the time that took.
  Total cache_hit;
  Total cache_miss;

  int64_t refused = 0;          // requests for which there was no room, of `fail`
  int64_t inference_count = 0;  // examples computed
  int64_t execution_count = 0;  // forward passes
  absl::Time last_inference = absl::UnixEpoch();

  // Forward passes by their number of examples. Of sizes beyond the first thousand, none.
  struct Batch {
    Total compute_input;
    Total compute_infer;
    Total compute_output;
  };
  std::map<int64_t, Batch> batches;
};

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_MODEL_STATISTICS_H_
