#include "predserver/batch_run.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/trace.h"
#include "predserver/batch_inputs.h"

namespace codistill {
namespace {

class Run {
 public:
  using Results = absl::Span<absl::StatusOr<Computed>>;
  using Requests = absl::Span<const WaitingRequest* const>;

  Run(const ModelConfig& config, const Model& model, Clock* clock, std::vector<PassTimes>* passes)
      : config_(config), model_(model), clock_(clock), passes_(passes) {}

  void Compute(Requests requests, Results results) {
    const absl::Time start = clock_->Now();
    std::vector<absl::Status> usable;
    BatchInputs batch = AssembleBatch(config_, requests, &usable);
    if (LeaveOutBad(requests, usable, results)) return;

    const absl::Time assembled = clock_->Now();
    TraceSpan pass("pass", "pass");
    pass.Arg("requests", static_cast<int64_t>(requests.size())).Arg("examples", batch.examples);
    absl::StatusOr<Model::Logits> logits = model_.Predict(batch.inputs, &batch.states);
    pass.End();
    if (logits.ok() && logits->rows % batch.examples != 0) {
      logits = absl::InternalError(
          absl::StrCat("the model gave ", logits->rows, " rows for ", batch.examples, " examples"));
    }
    if (!logits.ok()) {
      Fail(requests, logits.status(), results);
      return;
    }
    passes_->push_back({static_cast<int64_t>(requests.size()), batch.examples, assembled - start,
                        clock_->Now() - assembled});
    Split(requests, batch, *logits, results);
  }

 private:
  // If there are any, computes the others.
  bool LeaveOutBad(Requests requests, const std::vector<absl::Status>& usable, Results results) {
    Results::size_type bad = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      if (usable[i].ok()) continue;
      results[i] = usable[i];
      ++bad;
    }
    if (bad == 0) return false;
    std::vector<const WaitingRequest*> good;
    for (size_t i = 0; i < requests.size(); ++i) {
      if (usable[i].ok()) good.push_back(requests[i]);
    }
    if (good.empty()) return true;
    std::vector<absl::StatusOr<Computed>> of_good(good.size());
    Compute(good, absl::MakeSpan(of_good));
    for (size_t i = 0, next = 0; i < requests.size(); ++i) {
      if (usable[i].ok()) results[i] = std::move(of_good[next++]);
    }
    return true;
  }

  void Fail(Requests requests, const absl::Status& status, Results results) {
    if (requests.size() == 1 || !absl::IsInvalidArgument(status)) {
      for (auto& result : results) result = status;
      return;
    }
    const size_t half = requests.size() / 2;
    Compute(requests.subspan(0, half), results.subspan(0, half));
    Compute(requests.subspan(half), results.subspan(half));
  }

  void Split(Requests requests, const BatchInputs& batch, const Model::Logits& logits,
             Results results) {
    const int64_t rows = logits.rows / batch.examples;
    int64_t begin = 0;
    for (size_t i = 0; i < requests.size(); ++i) {
      const int64_t examples = requests[i]->examples();
      Computed computed;
      computed.logits = RowRange(logits.values, begin * rows, examples * rows);
      computed.states.resize(batch.states.size());
      for (size_t s = 0; s < batch.states.size(); ++s) {
        if (!requests[i]->plan.want_states[s]) continue;
        const int dimension = BatchDimension(config_.states(static_cast<int>(s)));
        computed.states[s] = StateRange(batch.states[s], dimension, begin, examples);
      }
      results[i] = std::move(computed);
      begin += examples;
    }
  }

  const ModelConfig& config_;
  const Model& model_;
  Clock* const clock_;
  std::vector<PassTimes>* const passes_;
};

}  // namespace

std::vector<absl::StatusOr<Computed>> ComputeBatch(const ModelConfig& config, const Model& model,
                                                   absl::Span<const WaitingRequest* const> requests,
                                                   Clock* clock, std::vector<PassTimes>* passes) {
  std::vector<absl::StatusOr<Computed>> results(requests.size());
  Run(config, model, clock, passes).Compute(requests, absl::MakeSpan(results));
  return results;
}

}  // namespace codistill
