#include "common/model/model_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {

absl::StatusOr<std::shared_ptr<ModelPool>> ModelPool::Create(Model::Options options, int held) {
  if (held < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("prediction.held_versions is ", held, "; it must be at least 1"));
  }
  std::shared_ptr<ModelPool> pool(new ModelPool(std::move(options), held + 2));
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Model> model, pool->Take());
  pool->tensors_ = model->tensors();
  pool->Return(std::move(model));
  return pool;
}

absl::StatusOr<std::unique_ptr<Model>> ModelPool::Take() {
  {
    MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &ModelPool::CanTake));
    if (stopped_) return absl::CancelledError("stopped");
    if (!spare_.empty()) {
      std::unique_ptr<Model> model = std::move(spare_.back());
      spare_.pop_back();
      return model;
    }
    ++loaded_;
  }
  auto model = Model::Load(options_);
  if (!model.ok()) {
    MutexLock lock(&mu_);
    --loaded_;
  }
  return model;
}

std::shared_ptr<const Model> ModelPool::Lend(std::unique_ptr<Model> model) {
  return std::shared_ptr<const Model>(model.release(),
                                      [pool = shared_from_this()](Model* returned) {
                                        pool->Return(std::unique_ptr<Model>(returned));
                                      });
}

void ModelPool::Return(std::unique_ptr<Model> model) {
  MutexLock lock(&mu_);
  spare_.push_back(std::move(model));
}

void ModelPool::Stop() {
  MutexLock lock(&mu_);
  stopped_ = true;
}

}  // namespace codistill
