#include "predserver/predictor.h"

#include <algorithm>
#include <cstring>
#include <iterator>
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

// Cheap while it is OK.
absl::Status StillWanted(const WaitingRequest& item, absl::Time now) {
  if (now >= item.request.deadline) {
    return absl::DeadlineExceededError(absl::StrCat("the deadline passed before compute, after ",
                                                    absl::ToInt64Milliseconds(now - item.arrived),
                                                    " ms in the queue"));
  }
  if (item.request.cancelled != nullptr && item.request.cancelled()) {
    return absl::CancelledError("the caller has gone");
  }
  return absl::OkStatus();
}

std::vector<int64_t> ReadIds(const PredictionRequest::Input& input) {
  std::vector<int64_t> ids(input.shape[0]);
  auto* to = reinterpret_cast<char*>(ids.data());
  for (const auto& part : input.parts) {
    std::memcpy(to, part.data(), part.size());
    to += part.size();
  }
  return ids;
}

absl::Status Draining() { return absl::UnavailableError("this prediction server is draining"); }

}  // namespace

Predictor::Options Predictor::FromConfig(const PredictionConfig& config) {
  Options options;
  options.max_queue = config.max_queue();
  options.max_batch_size = config.max_batch_size();
  options.max_batch_delay = absl::Microseconds(config.max_batch_delay_us());
  options.cache_bytes = config.cache_bytes();
  options.cache_window_steps = config.cache_window_steps();
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
  if (options.cache_bytes < 0 || options.cache_window_steps < 0) {
    return absl::InvalidArgumentError(
        "prediction.cache_bytes or cache_window_steps is negative; they must be 0 or more");
  }
  if (options.cache_bytes > 0 && options.config.states_size() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("prediction.cache_bytes is ", options.cache_bytes,
                     "; predictions of a model with recurrent state cannot be cached"));
  }
  return std::unique_ptr<Predictor>(new Predictor(std::move(options)));
}

Predictor::Predictor(Options options)
    : options_(std::move(options)),
      cache_(options_.cache_bytes > 0 ? std::make_unique<PredictionCache>(options_.cache_bytes)
                                      : nullptr),
      queue_(options_.max_queue),
      policy_({options_.max_batch_size, options_.max_batch_delay}),
      metrics_({options_.model, options_.metrics, options_.followed, [this] {
                  const int64_t bytes = cache_ == nullptr ? 0 : cache_->bytes();
                  MutexLock lock(&mu_);
                  return PredictionMetrics::Now{queue_.size(), bytes};
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
  std::vector<Item> dead =
      queue_.RemoveIf([now](const WaitingRequest& item) { return !StillWanted(item, now).ok(); });
  for (auto parked = parked_.begin(); parked != parked_.end();) {
    const auto next = std::next(parked);
    if (!StillWanted(*parked->second, now).ok()) {
      dead.push_back(std::move(parked->second));
      parked_.erase(parked);
    }
    parked = next;
  }
  for (Item& item : dead) {
    absl::Status status = StillWanted(*item, now);
    if (status.ok()) status = absl::CancelledError("the caller was not there for a moment");
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
  if (cache_ != nullptr) return absl::OkStatus();
  const absl::Time now = options_.clock->Now();
  Taken taken;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (!FindRoom(client, now, &taken)) status = Refusal(now);
  }
  FinishFailed(std::move(taken.failed));
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
  if (!status.ok()) return Finish(std::move(item), std::move(status));
  item->plan = *std::move(plan);
  if (cache_ == nullptr || item->plan.example_id < 0 || !item->request.version.empty()) {
    return Enqueue(std::move(item));
  }
  item->cached = std::make_unique<CachedRows>(cache_.get(),
                                              ReadIds(item->request.inputs[item->plan.example_id]),
                                              options_.config.num_outputs());
  Proceed(std::move(item));
}

void Predictor::Enqueue(Item item) {
  bool wake = false;
  Taken taken;
  {
    MutexLock lock(&mu_);
    if (draining_ && !item->accepted) {
      taken.failed.push_back({std::move(item), Draining()});
    } else if (!FindRoom(item->request.client, item->arrived, &taken)) {
      taken.failed.push_back({std::move(item), Refusal(options_.clock->Now())});
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      if (!std::exchange(item->open, true)) policy_.Came(item->arrived);
      Item displaced = queue_.Push(std::move(item));
      if (displaced != nullptr) {
        taken.failed.push_back({std::move(displaced), Refusal(options_.clock->Now())});
      }
      // While a pass waits for more, only the last of those that it waits for need tell.
      wake = !policy_.waiting() || policy_.Enough(queue_.size(), queue_.examples());
      if (wake) ++unanswered_;  // the entry stays until Wake has returned
    }
  }
  if (wake) {
    options_.pool->Wake(entry_);
    Left(1);
  }
  FinishFailed(std::move(taken.failed));
}

void Predictor::Proceed(Item item) {
  const absl::StatusOr<Snapshot> snapshot = Choose(item->request);
  if (!snapshot.ok()) return Finish(std::move(item), snapshot.status());
  const absl::Time start = options_.clock->Now();
  const Version& held = (*snapshot)->version;
  int64_t least_step = held.step() - options_.cache_window_steps;
  if (item->request.max_staleness_steps >= 0) {
    least_step = std::max(least_step, LatestStep(held) - item->request.max_staleness_steps);
  }
  int64_t hits = 0, misses = 0;
  const CachedRows::Next next = item->cached->Look(held.generation(), least_step, &hits, &misses);
  metrics_.LookedUp(hits, misses, options_.clock->Now() - start);
  switch (next) {
    case CachedRows::Next::kAnswer: {
      absl::StatusOr<Prediction> prediction = MakeCached(*item, (*snapshot)->precision);
      return Finish(std::move(item), std::move(prediction));
    }
    case CachedRows::Next::kCompute:
      item->only = item->cached->compute();
      return Enqueue(std::move(item));
    case CachedRows::Next::kWait:
      return Park(std::move(item));
  }
}

void Predictor::Park(Item item) {
  const WaitingRequest* const key = item.get();
  std::shared_ptr<PredictionCache::Waiter> waiter;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    if (draining_ && !item->accepted) {
      status = Draining();
    } else if (parked_.size() >= static_cast<size_t>(options_.max_queue)) {
      status = Refusal(options_.clock->Now());
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      ++unanswered_;  // for Start below
      waiter = item->cached->Wait([this, key] { Resume(key); });
      parked_[key] = std::move(item);
    }
  }
  if (waiter == nullptr) return Finish(std::move(item), std::move(status));
  waiter->Start();
  Left(1);
}

void Predictor::Resume(const WaitingRequest* parked) {
  Item item;
  {
    MutexLock lock(&mu_);
    const auto found = parked_.find(parked);
    if (found == parked_.end()) return;  // its deadline has passed meanwhile
    item = std::move(found->second);
    parked_.erase(found);
  }
  absl::Status wanted = StillWanted(*item, options_.clock->Now());
  wanted.ok() ? Proceed(std::move(item)) : Finish(std::move(item), std::move(wanted));
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
  FinishFailed(std::move(taken->failed));
  if (!taken->items.empty()) offer.pass = [this, taken] { Compute(taken.get()); };
  return offer;
}

void Predictor::Compute(Taken* taken) {
  std::vector<Item>& items = taken->items;
  const FollowedModel::Snapshot& snapshot = *taken->snapshot;
  std::vector<const WaitingRequest*> requests;
  absl::Time waiting_since = absl::InfiniteFuture();
  absl::Duration queued;
  for (const Item& item : items) {
    requests.push_back(item.get());
    waiting_since = std::min(waiting_since, item->arrived);
    queued += item->taken - item->arrived;
  }
  std::vector<PassTimes> passes;
  std::vector<absl::StatusOr<Computed>> computed =
      ComputeBatch(options_.config, *snapshot.model, requests, options_.clock, &passes);

  const absl::Time computed_at = options_.clock->Now();
  std::vector<absl::StatusOr<Prediction>> predictions(items.size());
  std::vector<Item> unfinished;  // with cached rows, which are not all there yet
  for (size_t i = 0; i < items.size(); ++i) {
    if (!computed[i].ok()) {
      predictions[i] = computed[i].status();
    } else if (items[i]->cached == nullptr) {
      predictions[i] = MakePrediction(*items[i], *computed[i], snapshot.version, snapshot.loaded_at,
                                      snapshot.precision);
    } else if (!items[i]->cached->Take(computed[i]->logits, snapshot.version, snapshot.loaded_at)) {
      items[i]->cached = nullptr;
      items[i]->only.clear();
      unfinished.push_back(std::move(items[i]));
    } else if (!items[i]->cached->complete()) {
      unfinished.push_back(std::move(items[i]));
    } else {
      predictions[i] = MakeCached(*items[i], snapshot.precision);
    }
  }
  const absl::Time now = options_.clock->Now();
  const auto count = static_cast<int64_t>(items.size());
  for (const PassTimes& pass : passes) {
    metrics_.Computed({pass.requests, pass.examples, queued * pass.requests / count, pass.input,
                       pass.infer, (now - computed_at) / static_cast<int64_t>(passes.size())},
                      now);
  }
  {
    // Before the answers leave: who asks again at once is not one more.
    MutexLock lock(&mu_);
    rate_.Passed(static_cast<int>(count), waiting_since, now);
    policy_.Computed(static_cast<int>(count));
    int answered = 0;
    for (const Item& item : items) answered += item != nullptr && std::exchange(item->open, false);
    policy_.Answered(answered, now);
  }
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i] != nullptr) Finish(std::move(items[i]), std::move(predictions[i]));
  }
  for (Item& item : unfinished) {
    item->cached == nullptr ? Enqueue(std::move(item)) : Proceed(std::move(item));
  }
}

absl::StatusOr<Prediction> Predictor::MakePrediction(const WaitingRequest& item,
                                                     const Computed& computed,
                                                     const Version& version, absl::Time loaded_at,
                                                     DataType precision) const {
  Prediction prediction;
  CODISTILL_ASSIGN_OR_RETURN(
      prediction.outputs,
      FormatOutputs(computed.logits, options_.config.label_loss(), item.plan, item.request.format));
  for (size_t i = 0; i < computed.states.size(); ++i) {
    if (!item.plan.want_states[i]) continue;
    prediction.outputs.push_back(
        {options_.config.states(static_cast<int>(i)).name(), computed.states[i]});
  }
  prediction.version = version;
  prediction.precision = precision;
  prediction.latest_step = LatestStep(version);
  prediction.staleness_steps = prediction.latest_step - version.step();
  prediction.age = std::max(absl::ZeroDuration(), options_.clock->Now() - loaded_at);
  return prediction;
}

absl::StatusOr<Prediction> Predictor::MakeCached(const WaitingRequest& item,
                                                 DataType precision) const {
  Version version;
  version.set_generation(item.cached->generation());
  version.set_step(item.cached->oldest().step);
  return MakePrediction(item, {item.cached->logits(), {}}, version, item.cached->oldest().loaded_at,
                        precision);
}

int64_t Predictor::LatestStep(const Version& held) const {
  return std::max(options_.followed->group_step(), held.step());
}

void Predictor::FinishFailed(std::vector<Failed> failed) {
  for (Failed& one : failed) Finish(std::move(one.item), std::move(one.status));
}

void Predictor::Finish(Item item, absl::StatusOr<Prediction> result) {
  if (std::exchange(item->open, false)) {
    MutexLock lock(&mu_);
    policy_.Answered(1, options_.clock->Now());
  }
  // Those who wait for what it was to compute no longer do so.
  if (item->cached != nullptr) item->cached->GiveUp();
  const absl::Time now = options_.clock->Now();
  metrics_.Answered(result.status(), now - item->arrived, now);
  item->done(std::move(result));
  if (!item->accepted) return;
  item = nullptr;  // before anybody may go
  Left(1);
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
