#ifndef CODISTILL_COMMON_MODEL_MODEL_POOL_H_
#define CODISTILL_COMMON_MODEL_MODEL_POOL_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/mutex.h"
#include "common/model/model.h"

namespace codistill {

// A few copies of one model, so that new weights can be read into one while others answer.
// Thread-safe; lives as long as anybody holds it or a model lent by it.
class ModelPool : public std::enable_shared_from_this<ModelPool> {
 public:
  // Loads the first copy, which shows whether the archive is good. `held`: versions that are kept
  // at a time, at least 1. Besides these there is a copy that loads, and one more for whoever still
  // uses a version that is kept no more: held + 2 bound the memory.
  static absl::StatusOr<std::shared_ptr<ModelPool>> Create(Model::Options options, int held = 1);

  // A copy that nobody else uses, with the contents that its last user left. Loads a further one if
  // need be; once there are as many as there may be, waits until one comes back. CANCELLED after
  // Stop.
  absl::StatusOr<std::unique_ptr<Model>> Take();

  // Lends a model taken before: it comes back to the pool when its last user lets go of it.
  std::shared_ptr<const Model> Lend(std::unique_ptr<Model> model);
  // Gives a model back at once.
  void Return(std::unique_ptr<Model> model);

  // Ends every wait in Take.
  void Stop();

  const TensorList& tensors() const { return tensors_; }

 private:
  ModelPool(Model::Options options, int max_models)
      : options_(std::move(options)), max_models_(max_models) {}
  bool CanTake() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return stopped_ || !spare_.empty() || loaded_ < max_models_;
  }

  const Model::Options options_;
  const int max_models_;
  TensorList tensors_;
  Mutex mu_;
  std::vector<std::unique_ptr<Model>> spare_ ABSL_GUARDED_BY(mu_);
  int loaded_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_MODEL_POOL_H_
