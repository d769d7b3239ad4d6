// Prediction servers: PredictionConfig.

#include "absl/strings/str_cat.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

constexpr int64_t kMaxThreads = 4096;
constexpr int64_t kMaxDelayUs = 60'000'000;
// Each may be a request of some size, and a model of any.
constexpr int64_t kMaxQueue = 1 << 20;
constexpr int64_t kMaxHeldVersions = 1000;

}  // namespace

void CheckPrediction(const JobConfig& job, Mistakes* mistakes) {
  const PredictionConfig& prediction = job.prediction();
  mistakes->Between("prediction.max_queue", prediction.max_queue(), 1, kMaxQueue);
  mistakes->Between("prediction.threads", prediction.threads(), 1, kMaxThreads);
  const DataType transfer = prediction.transfer_dtype();
  if (transfer != DT_FLOAT && transfer != DT_BFLOAT16) {
    mistakes->Add("prediction.transfer_dtype", absl::StrCat("is ", DataType_Name(transfer),
                                                            "; DT_FLOAT or DT_BFLOAT16 is right"));
  }
  mistakes->AtLeast("prediction.max_batch_size", prediction.max_batch_size(), 1);
  mistakes->Between("prediction.max_batch_delay_us", prediction.max_batch_delay_us(), 0,
                    kMaxDelayUs);
  mistakes->AtLeast("prediction.cache_bytes", prediction.cache_bytes(), 0);
  if (prediction.cache_bytes() > 0 && job.model().states_size() > 0) {
    mistakes->Add(
        "prediction.cache_bytes",
        absl::StrCat("not possible with recurrent state (", prediction.cache_bytes(),
                     "): what a model of model.states predicts depends on more than the example; "
                     "0 would be right"));
  }
  mistakes->AtLeast("prediction.cache_window_steps", prediction.cache_window_steps(), 0);
  const DataType weights = prediction.weights();
  if (weights != DT_FLOAT && weights != DT_BFLOAT16 && weights != DT_INT8) {
    mistakes->Add(
        "prediction.weights",
        absl::StrCat("is ", DataType_Name(weights), "; DT_FLOAT, DT_BFLOAT16 or DT_INT8 is right"));
  }
  mistakes->Between("prediction.held_versions", prediction.held_versions(), 1, kMaxHeldVersions);
  mistakes->Between("prediction.compute_threads", prediction.compute_threads(), 1, kMaxThreads);
}

}  // namespace internal
}  // namespace codistill
