#include "worker/evaluator.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/schedule.h"
#include "glog/logging.h"
#include "nlohmann/json.hpp"
#include "worker/evaluate_models.h"

namespace codistill {
namespace {

constexpr absl::Duration kReportTimeout = absl::Seconds(5);
constexpr absl::Duration kReportPause = absl::Milliseconds(200);

bool SameVersion(const Version& a, const Version& b) {
  return a.generation() == b.generation() && a.step() == b.step();
}

std::string Describe(const EvaluationResult& result) {
  std::string text = absl::StrCat("loss ", result.loss());
  if (result.has_accuracy()) absl::StrAppend(&text, ", accuracy ", result.accuracy());
  if (result.has_auc()) absl::StrAppend(&text, ", AUC ", result.auc());
  return absl::StrCat(text, ", ", result.examples(), " examples");
}

}  // namespace

bool Evaluator::Wants(const JobConfig& job, int64_t step) {
  // ASYNC may end a little beyond its last step.
  return EvaluatesAt(job, step) || step >= job.stop().steps();
}

Evaluator::Evaluator(Options options)
    : options_(std::move(options)),
      patience_(options_.patience > absl::ZeroDuration()
                    ? options_.patience
                    : absl::Seconds(2 * options_.job.training().rejoin_timeout_s()) +
                          absl::Minutes(1)),
      start_(absl::Now()) {}

void Evaluator::Drain() {
  MutexLock lock(&mu_);
  drain_ = true;
}

bool Evaluator::stopping() const {
  MutexLock lock(&mu_);
  return drain_;
}

void Evaluator::SetState(const std::string& state, const std::string& detail, int64_t step) {
  MutexLock lock(&mu_);
  state_ = state;
  detail_ = detail;
  step_ = step;
}

void Evaluator::FillStatus(DaemonStatus* status) const {
  MutexLock lock(&mu_);
  status->set_state(state_);
  status->set_detail(detail_);
  status->set_step(step_);
  status->set_rate(rate_);
  status->set_rate_unit("examples/s");
}

absl::Status Evaluator::Run() {
  const size_t n = options_.groups.size();
  std::vector<SnapshotPtr> held(n);
  std::vector<Version> seen(n);
  while (!stopping()) {
    SetState("waiting", "for the next cut", 0);
    bool all_last = true;
    for (size_t g = 0; g < n; ++g) {
      CODISTILL_RETURN_IF_ERROR(CheckAlive(g));
      if (IsLast(g, held[g])) continue;
      all_last = false;
      auto snapshot = options_.groups[g].model->WaitForNewer(seen[g], absl::Now() + options_.poll);
      if (!snapshot.ok()) continue;
      held[g] = *std::move(snapshot);
      seen[g] = held[g]->version;
      // The last cut waits for those of the other groups.
      if (seen[g].step() >= options_.job.stop().steps() || IsLast(g, held[g])) continue;
      const absl::Status status = EvaluateCut(g, *held[g]);
      if (absl::IsCancelled(status) && stopping()) break;
      CODISTILL_RETURN_IF_ERROR(status);
      held[g] = nullptr;  // its memory is wanted for the next
    }
    if (all_last) {
      const absl::Status status = EvaluateLast(held);
      if (absl::IsCancelled(status) && stopping()) break;
      if (absl::IsAborted(status)) {
        // A finished group that lost a shard comes back under a new generation with a cut of its
        // own.
        LOG(WARNING) << status << "; measuring again";
        MutexLock lock(&mu_);
        mu_.AwaitWithTimeout(absl::Condition(&drain_), options_.poll);
        continue;
      }
      SetState(status.ok() ? "finished" : "failed", std::string(status.message()), 0);
      return status;
    }
  }
  SetState("finished", "drained", 0);
  return absl::OkStatus();
}

absl::Status Evaluator::CheckAlive(size_t group) const {
  const GroupState state = options_.groups[group].model->group_state();
  if (state.phase() == GroupState::FAILED) {
    return absl::AbortedError(absl::StrCat("group ", Name(group), " failed: ", state.error()));
  }
  const absl::Duration silence =
      std::min(options_.groups[group].model->group_silence(), absl::Now() - start_);
  if (silence > patience_) {
    return absl::UnavailableError(absl::StrCat("group ", Name(group), ": its leader at ",
                                               options_.job.groups(group).shards_size() > 0
                                                   ? options_.job.groups(group).shards(0).address()
                                                   : std::string("an unknown address"),
                                               " was not heard of for ",
                                               absl::FormatDuration(patience_)));
  }
  return absl::OkStatus();
}

bool Evaluator::IsLast(size_t group, const SnapshotPtr& held) const {
  const GroupState state = options_.groups[group].model->group_state();
  if (state.phase() != GroupState::FINISHED || held == nullptr) return false;
  return SameVersion(held->version, state.newest_cut());
}

absl::Status Evaluator::EvaluateCut(size_t group, const FollowedModel::Snapshot& snapshot) {
  const int64_t step = snapshot.version.step();
  const std::string what = absl::StrCat(Name(group), " step ", step);
  SetState("evaluating", what, step);
  EvaluateOptions options;
  options.job = &options_.job;
  options.validation = options_.validation;
  options.max_examples = options_.job.evaluation().max_examples();
  options.stop = [this] { return stopping(); };
  const absl::Time start = absl::Now();
  auto evaluation = EvaluateModels(options, {snapshot.model.get()});
  if (!evaluation.ok()) return Annotate(evaluation.status(), what);
  EvaluationResult result = std::move(evaluation->results[0]);
  *result.mutable_version() = snapshot.version;
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  LOG(INFO) << what << ": " << Describe(result) << ", in " << seconds << " s";
  {
    MutexLock lock(&mu_);
    rate_ = seconds > 0 ? result.examples() / seconds : 0;
  }
  const absl::Status reported = Report(group, result, absl::ZeroDuration());
  LOG_IF(WARNING, !reported.ok()) << what << " is not reported: " << reported;
  return absl::OkStatus();
}

absl::Status Evaluator::EvaluateLast(const std::vector<SnapshotPtr>& held) {
  std::vector<const Model*> models;
  for (const SnapshotPtr& snapshot : held) models.push_back(snapshot->model.get());
  const int64_t step = held[0]->version.step();
  EvaluateOptions options;
  options.job = &options_.job;
  options.validation = options_.validation;
  // The groups have finished: the machine is ours.
  options.parallel_models = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  options.stop = [this] { return stopping(); };
  options.on_progress = [this, step](int64_t done, int64_t total) {
    SetState("evaluating",
             absl::StrCat("the last cuts of all groups: ", done, " of ", total, " examples"), step);
  };
  CODISTILL_ASSIGN_OR_RETURN(Evaluation evaluation, EvaluateModels(options, models));
  for (size_t g = 0; g < held.size(); ++g) {
    EvaluationResult& result = evaluation.results[g];
    *result.mutable_version() = held[g]->version;
    result.set_final(true);
    LOG(INFO) << Name(g) << ", last cut (step " << result.version().step()
              << "): " << Describe(result);
    CODISTILL_RETURN_IF_ERROR(
        Annotate(Report(g, result, absl::Seconds(options_.job.training().rejoin_timeout_s())),
                 absl::StrCat("reporting the last evaluation to the leader of group ", Name(g))));
  }
  if (held.size() > 1) LOG(INFO) << "disagreement of the groups: " << evaluation.disagreement;
  return WriteFile(evaluation.disagreement, evaluation.results);
}

absl::Status Evaluator::Report(size_t group, const EvaluationResult& result,
                               absl::Duration patience) {
  if (options_.metrics != nullptr) {
    const Metrics::Labels labels = {{"of_group", Name(group)}};
    options_.metrics
        ->counter("codistill_evaluator_evaluations_total", "Cuts that were measured.", labels)
        ->Add();
    options_.metrics
        ->gauge("codistill_evaluator_loss", "Validation loss of the last cut, nats a label.",
                labels)
        ->Set(result.loss());
    options_.metrics
        ->gauge("codistill_evaluator_step", "Step of the last cut that was measured.", labels)
        ->Set(static_cast<double>(result.version().step()));
  }
  const absl::Time give_up = absl::Now() + patience;
  for (;;) {
    const absl::Status status =
        options_.groups[group].leader->ReportEvaluation(result, absl::Now() + kReportTimeout);
    const bool again = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
    if (!again || absl::Now() >= give_up || stopping()) return status;
    MutexLock lock(&mu_);
    mu_.AwaitWithTimeout(absl::Condition(&drain_), kReportPause);
  }
}

absl::Status Evaluator::WriteFile(double disagreement,
                                  const std::vector<EvaluationResult>& results) const {
  if (options_.evaluation_file.empty()) return absl::OkStatus();
  nlohmann::ordered_json groups = nlohmann::ordered_json::array();
  for (size_t g = 0; g < results.size(); ++g) {
    const EvaluationResult& result = results[g];
    nlohmann::ordered_json group = {{"name", Name(g)},
                                    {"generation", result.version().generation()},
                                    {"step", result.version().step()},
                                    {"loss", result.loss()}};
    if (result.has_accuracy()) group["accuracy"] = result.accuracy();
    if (result.has_auc()) group["auc"] = result.auc();
    group["examples"] = result.examples();
    groups.push_back(std::move(group));
  }
  const nlohmann::ordered_json json = {{"group_disagreement", disagreement}, {"groups", groups}};
  return Annotate(WriteFileAtomically(options_.evaluation_file, json.dump(2) + "\n"),
                  "--evaluation_file");
}

}  // namespace codistill
