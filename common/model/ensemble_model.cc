#include "common/model/ensemble_model.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/model/average_logits.h"
#include "common/model/held_versions.h"

namespace codistill {
namespace {

using SnapshotPtr = std::shared_ptr<const FollowedModel::Snapshot>;

// How often a wait looks at the members.
constexpr absl::Duration kLook = absl::Milliseconds(10);

// One combination of the members' versions.
class AverageModel final : public Model {
 public:
  AverageModel(std::shared_ptr<const EnsembleOptions> options, std::vector<SnapshotPtr> members)
      : options_(std::move(options)), members_(std::move(members)) {}

  const TensorList& tensors() const override { return tensors_; }
  absl::Span<const TensorView> storage() const override { return {}; }

  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States*) const override {
    std::vector<Logits> all;
    std::vector<const float*> values;
    for (size_t i = 0; i < members_.size(); ++i) {
      States none;
      absl::StatusOr<Logits> logits = members_[i]->model->Predict(inputs, &none);
      if (!logits.ok()) return Annotate(logits.status(), MemberName(i));
      if (logits->values.shape() != std::vector<int64_t>{logits->rows, outputs()} ||
          (i > 0 && logits->rows != all[0].rows)) {
        return absl::InternalError(
            absl::StrCat(MemberName(i), " gave logits ", ShapeString(logits->values.shape()),
                         "; those of the others are ",
                         ShapeString({all.empty() ? -1 : all[0].rows, outputs()})));
      }
      all.push_back(*std::move(logits));
      values.push_back(all.back().values.As<float>().data());
    }
    Logits average;
    average.rows = all[0].rows;
    average.values = Tensor::Allocate(DT_FLOAT, {average.rows, outputs()});
    Average()(values, average.rows, outputs(), average.values.As<float>().data());
    return average;
  }

  absl::StatusOr<Logits> Forward(absl::Span<const Tensor>, States*, uint64_t) override {
    return absl::UnimplementedError("an ensemble is not trained");
  }
  absl::Status Backward(const Tensor&, const OnGradient&) override {
    return absl::UnimplementedError("an ensemble is not trained");
  }

 private:
  int64_t outputs() const { return options_->model.num_outputs(); }
  std::string MemberName(size_t i) const {
    return absl::StrCat("ensemble ", options_->name, ": member ", options_->members[i].name);
  }
  decltype(&AverageLogits) Average() const {
    if (options_->average == CodistillationConfig::LOGITS) return AverageLogits;
    switch (options_->model.label_loss()) {
      case SOFTMAX_CROSS_ENTROPY:
        return AverageSoftmax;
      case SIGMOID_CROSS_ENTROPY:
        return AverageSigmoid;
      case SQUARED_ERROR:
        break;
    }
    return AverageLogits;
  }

  const std::shared_ptr<const EnsembleOptions> options_;
  const std::vector<SnapshotPtr> members_;
  const TensorList tensors_;
};

// Which of two precisions is rounded more.
DataType Lower(DataType a, DataType b) {
  const auto bits = [](DataType dtype) { return ElementSize(dtype); };
  return bits(b) < bits(a) ? b : a;
}

class EnsembleModel final : public FollowedModel {
 public:
  explicit EnsembleModel(EnsembleOptions options)
      : options_(std::make_shared<const EnsembleOptions>(std::move(options))) {}

  absl::StatusOr<SnapshotPtr> Get() const override {
    std::vector<SnapshotPtr> members;
    SnapshotPtr old;  // let go of outside the lock
    // Held meanwhile, so that of two callers none puts back what the other has found newer.
    MutexLock lock(&mu_);
    for (const EnsembleMember& member : options_->members) {
      absl::StatusOr<SnapshotPtr> snapshot = member.model->Get();
      if (!snapshot.ok()) {
        return Annotate(snapshot.status(),
                        absl::StrCat("ensemble ", options_->name, ": member ", member.name));
      }
      members.push_back(*std::move(snapshot));
    }
    if (members != members_) {
      old = std::exchange(current_, Combine(members));
      members_.swap(members);
      ++swaps_;
    }
    return current_;
  }

  absl::StatusOr<SnapshotPtr> WaitForNewer(const Version& than, absl::Time deadline) override {
    while (true) {
      absl::StatusOr<SnapshotPtr> now = Get();
      if (now.ok() && Follows((*now)->version, than)) return now;
      if (absl::Now() >= deadline) {
        return absl::DeadlineExceededError(now.ok() ? absl::StrCat("ensemble ", options_->name,
                                                                   ": nothing newer than ",
                                                                   VersionName(than), " yet")
                                                    : std::string(now.status().message()));
      }
      absl::SleepFor(std::min(kLook, deadline - absl::Now()));
    }
  }

  GroupState group_state() const override {
    GroupState state;
    state.set_phase(GroupState::FINISHED);
    for (const EnsembleMember& member : options_->members) {
      const GroupState::Phase phase = member.model->group_state().phase();
      if (phase != GroupState::FINISHED) state.set_phase(phase);
    }
    if (const auto now = Get(); now.ok()) {
      state.mutable_version()->set_generation((*now)->version.generation());
      state.mutable_version()->set_step((*now)->version.step() + Staleness());
      *state.mutable_newest_cut() = (*now)->version;
    }
    return state;
  }
  absl::Duration group_silence() const override {
    absl::Duration longest = absl::ZeroDuration();
    for (const EnsembleMember& member : options_->members) {
      longest = std::max(longest, member.model->group_silence());
    }
    return longest;
  }
  int64_t group_step() const override {
    const auto now = Get();
    return now.ok() ? (*now)->version.step() + Staleness() : 0;
  }

  Counters counters() const override {
    Counters sum;
    std::vector<std::string> errors;
    for (const EnsembleMember& member : options_->members) {
      const Counters one = member.model->counters();
      sum.failed_loads += one.failed_loads;
      sum.pull_bytes += one.pull_bytes;
      if (!one.last_load_error.empty()) {
        errors.push_back(absl::StrCat("member ", member.name, ": ", one.last_load_error));
      }
    }
    sum.last_load_error = absl::StrJoin(errors, "; ");
    MutexLock lock(&mu_);
    sum.swaps = swaps_;
    return sum;
  }

 private:
  SnapshotPtr Combine(const std::vector<SnapshotPtr>& members) const {
    auto snapshot = std::make_shared<Snapshot>();
    snapshot->loaded_at = members[0]->loaded_at;
    snapshot->precision = members[0]->precision;
    uint64_t generation = 0;
    int64_t step = 0;
    for (const SnapshotPtr& member : members) {
      generation += member->version.generation();
      step += member->version.step();
      snapshot->loaded_at = std::min(snapshot->loaded_at, member->loaded_at);
      snapshot->precision = Lower(snapshot->precision, member->precision);
    }
    snapshot->version.set_generation(generation);
    snapshot->version.set_step(step);
    snapshot->model = std::make_shared<AverageModel>(options_, members);
    return snapshot;
  }

  // Of the stalest member.
  int64_t Staleness() const {
    int64_t worst = 0;
    for (const EnsembleMember& member : options_->members) {
      const auto held = member.model->Get();
      if (!held.ok()) continue;
      worst = std::max(worst, member.model->group_step() - (*held)->version.step());
    }
    return worst;
  }

  const std::shared_ptr<const EnsembleOptions> options_;
  mutable Mutex mu_;
  mutable std::vector<SnapshotPtr> members_ ABSL_GUARDED_BY(mu_);  // that current_ is made of
  mutable SnapshotPtr current_ ABSL_GUARDED_BY(mu_);
  mutable int64_t swaps_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<FollowedModel>> CreateEnsemble(EnsembleOptions options) {
  if (options.members.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("ensemble ", options.name, ": no members; two or more would be right"));
  }
  if (options.model.states_size() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("ensemble ", options.name, ": its members have recurrent state (",
                     options.model.states(0).name(),
                     "), which an average has not; name them as teachers one by one instead"));
  }
  return std::make_unique<EnsembleModel>(std::move(options));
}

}  // namespace codistill
