#ifndef CODISTILL_COMMON_MODEL_TESTING_PUPPET_MODEL_H_
#define CODISTILL_COMMON_MODEL_TESTING_PUPPET_MODEL_H_

#include <functional>
#include <memory>
#include <vector>

#include "common/base/mutex.h"
#include "common/model/followed_model.h"

namespace codistill {

// For tests: a followed model that does as it is told. Thread-safe.
class PuppetFollowedModel final : public FollowedModel {
 public:
  absl::StatusOr<std::shared_ptr<const Snapshot>> Get() const override;
  absl::StatusOr<std::shared_ptr<const Snapshot>> WaitForNewer(const Version& than,
                                                               absl::Time deadline) override;
  GroupState group_state() const override;
  absl::Duration group_silence() const override { return absl::ZeroDuration(); }
  Counters counters() const override;
  std::vector<std::shared_ptr<const Snapshot>> Held() const override;

  // How many versions are held at once.
  void Keep(int versions);
  void Hold(std::shared_ptr<const Model> model, uint64_t generation, int64_t step,
            absl::Time loaded_at = absl::Now());
  void SetGroupStep(uint64_t generation, int64_t step);

 private:
  mutable Mutex mu_;
  size_t keep_ ABSL_GUARDED_BY(mu_) = 1;
  std::vector<std::shared_ptr<const Snapshot>> held_ ABSL_GUARDED_BY(mu_);  // newest first
  GroupState state_ ABSL_GUARDED_BY(mu_);
  Counters counters_ ABSL_GUARDED_BY(mu_);
};

// For tests: a model whose forward pass is a function, and which can be held up.
class PuppetModel final : public Model {
 public:
  using Pass = std::function<absl::StatusOr<Logits>(absl::Span<const Tensor>, States*)>;
  explicit PuppetModel(Pass pass) : pass_(std::move(pass)) {}

  const TensorList& tensors() const override { return tensors_; }
  absl::Span<const TensorView> storage() const override { return {}; }
  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override;
  absl::StatusOr<Logits> Forward(absl::Span<const Tensor> inputs, States* states,
                                 uint64_t seed) override;
  absl::Status Backward(const Tensor& gradient, const OnGradient& on_gradient) override;

  // Passes begin, and wait until they are let go.
  void HoldUp();
  void LetGo();
  // Waits until so many passes have begun.
  void AwaitPasses(int count) const;

 private:
  const Pass pass_;
  TensorList tensors_;
  mutable Mutex mu_;
  mutable int begun_ ABSL_GUARDED_BY(mu_) = 0;
  bool held_up_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_TESTING_PUPPET_MODEL_H_
