#include "predserver/predictor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/model/held_versions.h"
#include "predserver/output_format.h"

namespace codistill {
namespace {

// A pass is not cut into smaller ones than this to keep other threads busy: reading the weights
// would cost more than is won.
constexpr int64_t kLeastShare = 16;

// A full queue is looked through for requests that nobody waits for any more at most so often.
constexpr absl::Duration kSweepInterval = absl::Milliseconds(1);

absl::Status Draining() { return absl::UnavailableError("this prediction server is draining"); }

}  // namespace

Predictor::Options Predictor::FromConfig(const PredictionConfig& config) {
  Options options;
  options.max_queue = config.max_queue();
  options.max_batch_size = config.max_batch_size();
  options.max_batch_delay = absl::Microseconds(config.max_batch_delay_us());
  return options;
}

absl::StatusOr<std::unique_ptr<Predictor>> Predictor::Create(Options options) {
  const auto at_least_one = [](const char* field, int64_t value) -> absl::Status {
    if (value >= 1) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("prediction.", field, " is ", value, "; it must be at least 1"));
  };
  CODISTILL_RETURN_IF_ERROR(at_least_one("max_queue", options.max_queue));
  CODISTILL_RETURN_IF_ERROR(at_least_one("max_batch_size", options.max_batch_size));
  if (options.max_batch_delay < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        "prediction.max_batch_delay_us is negative; it must be 0 or "
        "more");
  }
  return std::unique_ptr<Predictor>(new Predictor(std::move(options)));
}

Predictor::Predictor(Options options)
    : options_(std::move(options)),
      queue_(options_.max_queue),
      policy_({options_.max_batch_size, options_.max_batch_delay}),
      metrics_({options_.model, options_.metrics, options_.followed, [this] {
                  MutexLock lock(&mu_);
                  return PredictionMetrics::Now{queue_.size(), 0};
                }}) {
  entry_ = options_.pool->Join(
      [this](const ComputePool::Situation& situation) { return Next(situation); });
}

Predictor::~Predictor() { Drain(); }

absl::StatusOr<Predictor::Snapshot> Predictor::Choose(const PredictionRequest& request) const {
  CODISTILL_ASSIGN_OR_RETURN(Snapshot chosen, options_.followed->Get());
  if (!request.version.empty() && request.version != VersionName(chosen->version)) {
    const std::vector<Snapshot> held = options_.followed->Held();
    const auto found = std::find_if(held.begin(), held.end(), [&](const Snapshot& snapshot) {
      return VersionName(snapshot->version) == request.version;
    });
    if (found == held.end()) {
      return absl::NotFoundError(absl::StrCat("model ", options_.model, " has no version \"",
                                              request.version, "\" any more or yet; it has ",
                                              absl::StrJoin(held_versions(), ", ")));
    }
    chosen = *found;
  }
  if (request.max_staleness_steps >= 0) {
    const int64_t behind = LatestStep(chosen->version) - chosen->version.step();
    if (behind > request.max_staleness_steps) {
      return absl::FailedPreconditionError(absl::StrCat(
          "version ", VersionName(chosen->version), " is ", behind,
          " steps behind its group; max_staleness_steps is ", request.max_staleness_steps));
    }
  }
  return chosen;
}

absl::Status Predictor::Ready(const std::string& version) const {
  {
    MutexLock lock(&mu_);
    if (draining_) return Draining();
  }
  PredictionRequest any;
  any.version = version;
  return Choose(any).status();
}

std::vector<std::string> Predictor::held_versions() const {
  std::vector<std::string> names;
  for (const Snapshot& snapshot : options_.followed->Held()) {
    names.push_back(VersionName(snapshot->version));
  }
  return names;
}

absl::Status Predictor::Refusal(absl::Time now) {
  return WithRetryAfter(absl::ResourceExhaustedError(
                            absl::StrCat("model ", options_.model, ": ", queue_.size(),
                                         " requests are waiting already (prediction.max_queue)")),
                        rate_.RetryDelay(queue_.size(), now));
}

void Predictor::RemoveDead(absl::Time now, Taken* taken) {
  std::vector<Item> dead = queue_.RemoveIf([now](const WaitingRequest& item) {
    return now >= item.request.deadline ||
           (item.request.cancelled != nullptr && item.request.cancelled());
  });
  for (Item& item : dead) {
    absl::Status status =
        now >= item->request.deadline
            ? absl::DeadlineExceededError(
                  absl::StrCat("the deadline passed before compute, after ",
                               absl::ToInt64Milliseconds(now - item->arrived), " ms in the queue"))
            : absl::CancelledError("the caller has gone");
    taken->failed.push_back({std::move(item), std::move(status)});
  }
  swept_ = now;
}

bool Predictor::FindRoom(const std::string& client, absl::Time now, Taken* taken) {
  if (queue_.HasRoom(client)) return true;
  if (now - swept_ < kSweepInterval) return false;
  RemoveDead(now, taken);
  return queue_.HasRoom(client);
}

absl::Status Predictor::CheckRoom(const std::string& client) {
  const absl::Time now = options_.clock->Now();
  Taken taken;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (!FindRoom(client, now, &taken)) status = Refusal(now);
  }
  AnswerFailed(std::move(taken.failed));
  if (!status.ok()) metrics_.Answered(status, absl::ZeroDuration(), now);
  return status;
}

void Predictor::Predict(PredictionRequest request, Done done) {
  // Before anything is looked at closely.
  if (absl::Status room = CheckRoom(request.client); !room.ok()) return done(std::move(room));
  auto item = std::make_unique<WaitingRequest>();
  item->arrived = options_.clock->Now();
  item->request = std::move(request);
  item->done = std::move(done);
  absl::StatusOr<RequestPlan> plan = CheckRequest(options_.config, item->request);
  absl::Status status = plan.status();
  status.Update(Ready(item->request.version));
  if (!status.ok()) return Answer(*item, std::move(status));
  item->plan = *std::move(plan);

  bool wake = false;
  Taken taken;
  {
    MutexLock lock(&mu_);
    if (draining_) {
      taken.failed.push_back({std::move(item), Draining()});
    } else if (!FindRoom(item->request.client, item->arrived, &taken)) {
      taken.failed.push_back({std::move(item), Refusal(options_.clock->Now())});
    } else {
      item->accepted = true;
      policy_.Came(item->arrived);
      Item displaced = queue_.Push(std::move(item));
      if (displaced != nullptr) {
        taken.failed.push_back({std::move(displaced), Refusal(options_.clock->Now())});
      }
      // While a pass waits for more, only the last of those that it waits for need tell.
      wake = !policy_.waiting() || policy_.Enough(queue_.size(), queue_.examples());
      unanswered_ += wake ? 2 : 1;  // the entry stays until Wake has returned
    }
  }
  if (wake) {
    options_.pool->Wake(entry_);
    Left(1);
  }
  AnswerFailed(std::move(taken.failed));
}

void Predictor::TakeBatch(const ComputePool::Situation& situation, absl::Time now, Taken* taken) {
  int64_t most = options_.max_batch_size;
  const bool shared = situation.idle_threads > 0 && !situation.others_waiting;
  if (shared) {
    const int64_t threads = situation.idle_threads + 1;
    most = std::min(most, std::max(kLeastShare, (queue_.examples() + threads - 1) / threads));
  }
  int64_t examples = 0;
  std::vector<absl::Status> statuses;
  std::vector<Item> items = queue_.Take([&](const WaitingRequest& item) {
    absl::StatusOr<Snapshot> snapshot = Choose(item.request);
    if (snapshot.ok()) {
      if (examples == 0) {
        taken->snapshot = *snapshot;
      } else if (taken->snapshot != *snapshot) {
        return RequestQueue::Verdict::kSkip;
      } else if (examples + item.examples() > most) {
        return RequestQueue::Verdict::kStop;
      }
      examples += item.examples();
    }
    statuses.push_back(snapshot.status());
    return RequestQueue::Verdict::kTake;
  });
  for (size_t i = 0; i < items.size(); ++i) {
    if (!statuses[i].ok()) {
      taken->failed.push_back({std::move(items[i]), std::move(statuses[i])});
      continue;
    }
    items[i]->taken = now;
    taken->items.push_back(std::move(items[i]));
  }
  policy_.Started(static_cast<int>(taken->items.size()), shared ? queue_.size() : 0);
}

ComputePool::Offer Predictor::Next(const ComputePool::Situation& situation) {
  ComputePool::Offer offer;
  auto taken = std::make_shared<Taken>();
  const absl::Time now = options_.clock->Now();
  {
    MutexLock lock(&mu_);
    RemoveDead(now, taken.get());
    if (queue_.size() > 0) {
      const absl::Time start =
          draining_ ? now : policy_.StartAt(queue_.size(), queue_.examples(), now);
      if (start > now) {
        offer.again = start;
      } else {
        TakeBatch(situation, now, taken.get());
        offer.more = queue_.size() > 0;
        if (taken->items.empty() && offer.more) offer.again = now;
      }
    } else {
      policy_.StopWaiting();
    }
  }
  AnswerFailed(std::move(taken->failed));
  if (!taken->items.empty()) offer.pass = [this, taken] { Compute(*taken); };
  return offer;
}

void Predictor::Compute(const Taken& taken) {
  std::vector<const WaitingRequest*> requests;
  for (const Item& item : taken.items) requests.push_back(item.get());
  std::vector<PassTimes> passes;
  const std::vector<absl::StatusOr<Computed>> computed =
      ComputeBatch(options_.config, *taken.snapshot->model, requests, options_.clock, &passes);

  const absl::Time computed_at = options_.clock->Now();
  std::vector<absl::StatusOr<Prediction>> predictions;
  for (size_t i = 0; i < requests.size(); ++i) {
    predictions.push_back(computed[i].ok()
                              ? MakePrediction(*requests[i], *computed[i], *taken.snapshot)
                              : computed[i].status());
  }
  const absl::Time now = options_.clock->Now();
  absl::Time waiting_since = absl::InfiniteFuture();
  absl::Duration queued;
  for (const WaitingRequest* request : requests) {
    waiting_since = std::min(waiting_since, request->arrived);
    queued += request->taken - request->arrived;
  }
  for (const PassTimes& pass : passes) {
    metrics_.Computed({pass.requests, pass.examples,
                       queued * pass.requests / static_cast<int64_t>(requests.size()), pass.input,
                       pass.infer, (now - computed_at) / static_cast<int64_t>(passes.size())},
                      now);
  }
  const int count = static_cast<int>(requests.size());
  {
    // Before the answers leave: who asks again at once is not one more.
    MutexLock lock(&mu_);
    rate_.Passed(count, waiting_since, now);
    policy_.Computed(count);
    policy_.Answered(count, now);
  }
  for (size_t i = 0; i < requests.size(); ++i) Answer(*requests[i], std::move(predictions[i]));
  Left(count);
}

absl::StatusOr<Prediction> Predictor::MakePrediction(
    const WaitingRequest& item, const Computed& computed,
    const FollowedModel::Snapshot& snapshot) const {
  Prediction prediction;
  CODISTILL_ASSIGN_OR_RETURN(
      prediction.outputs,
      FormatOutputs(computed.logits, options_.config.label_loss(), item.plan, item.request.format));
  for (size_t i = 0; i < computed.states.size(); ++i) {
    if (!item.plan.want_states[i]) continue;
    prediction.outputs.push_back(
        {options_.config.states(static_cast<int>(i)).name(), computed.states[i]});
  }
  prediction.version = snapshot.version;
  prediction.precision = snapshot.precision;
  prediction.latest_step = LatestStep(snapshot.version);
  prediction.staleness_steps = prediction.latest_step - snapshot.version.step();
  prediction.age = std::max(absl::ZeroDuration(), options_.clock->Now() - snapshot.loaded_at);
  return prediction;
}

int64_t Predictor::LatestStep(const Version& held) const {
  return std::max(options_.followed->group_step(), held.step());
}

void Predictor::AnswerFailed(std::vector<Failed> failed) {
  if (failed.empty()) return;
  int accepted = 0;
  for (const Failed& one : failed) accepted += one.item->accepted ? 1 : 0;
  {
    MutexLock lock(&mu_);
    policy_.Answered(accepted, options_.clock->Now());
  }
  for (Failed& one : failed) Answer(*one.item, std::move(one.status));
  Left(accepted);
}

void Predictor::Answer(const WaitingRequest& item, absl::StatusOr<Prediction> result) {
  const absl::Time now = options_.clock->Now();
  metrics_.Answered(result.status(), now - item.arrived, now);
  item.done(std::move(result));
}

void Predictor::Left(int requests) {
  MutexLock lock(&mu_);
  unanswered_ -= requests;
}

std::string Predictor::Detail() const {
  const absl::StatusOr<Snapshot> snapshot = options_.followed->Get();
  if (!snapshot.ok()) return std::string(snapshot.status().message());
  const Version& held = (*snapshot)->version;
  std::string detail = absl::StrCat("version ", VersionName(held), ", ",
                                    LatestStep(held) - held.step(), " steps behind");
  const absl::Duration silence = options_.followed->group_silence();
  if (silence > absl::Seconds(5)) {
    absl::StrAppend(&detail, "; no word from the group for ",
                    absl::FormatDuration(absl::Trunc(silence, absl::Seconds(1))));
  }
  return detail;
}

void Predictor::FillStatus(ServedModelStatus* status) const {
  status->set_model(options_.model);
  status->set_latest_step(options_.followed->group_state().version().step());
  metrics_.Fill(status);
  for (const Snapshot& snapshot : options_.followed->Held()) {
    if (status->held_size() == 0) {
      *status->mutable_version() = snapshot->version;
      status->set_precision(std::string(DataTypeName(snapshot->precision)));
    }
    *status->add_held() = snapshot->version;
  }
}

void Predictor::Drain() {
  MutexLock once(&drain_mu_);
  if (entry_ == nullptr) return;
  {
    MutexLock lock(&mu_);
    draining_ = true;
  }
  options_.pool->Wake(entry_);
  {
    MutexLock lock(&mu_);
    const auto none = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return unanswered_ == 0; };
    mu_.Await(absl::Condition(&none));
  }
  options_.pool->Leave(entry_);
  entry_ = nullptr;
}

}  // namespace codistill
