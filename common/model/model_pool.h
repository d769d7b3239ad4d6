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
  // One that answers, one that loads, and one more for whoever still holds an older version.
  static constexpr int kMaxModels = 3;

  // Loads the first copy, which shows whether the archive is good.
  static absl::StatusOr<std::shared_ptr<ModelPool>> Create(Model::Options options);

  // A copy that nobody else uses. Loads a further one if need be; once there are kMaxModels, waits
  // until one comes back. CANCELLED after Stop.
  absl::StatusOr<std::unique_ptr<Model>> Take();

  // Lends a model taken before: it comes back to the pool when its last user lets go of it.
  std::shared_ptr<const Model> Lend(std::unique_ptr<Model> model);
  // Gives a model back at once.
  void Return(std::unique_ptr<Model> model);

  // Ends every wait in Take.
  void Stop();

  const TensorList& tensors() const { return tensors_; }

 private:
  explicit ModelPool(Model::Options options) : options_(std::move(options)) {}
  bool CanTake() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return stopped_ || !spare_.empty() || loaded_ < kMaxModels;
  }

  const Model::Options options_;
  TensorList tensors_;
  Mutex mu_;
  std::vector<std::unique_ptr<Model>> spare_ ABSL_GUARDED_BY(mu_);
  int loaded_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_MODEL_POOL_H_
