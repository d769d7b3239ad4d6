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

namespace codistill {
namespace {

// A full queue is looked through for requests that nobody waits for any more at most so often.
constexpr absl::Duration kSweepInterval = absl::Milliseconds(1);

std::vector<int64_t> ReadIds(const PredictionRequest::Input& input) {
  std::vector<int64_t> ids(input.shape[0]);
  auto* to = reinterpret_cast<char*>(ids.data());
  for (const auto& part : input.parts) {
    std::memcpy(to, part.data(), part.size());
    to += part.size();
  }
  return ids;
}

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
      queue_(options_.max_queue, options_.max_queue_bytes),
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

absl::Status Predictor::Refusal(size_t waiting, absl::Time now) {
  std::string text = absl::StrCat("model ", options_.model, ": ", waiting, " requests");
  if (waiting >= static_cast<size_t>(options_.max_queue)) {
    absl::StrAppend(&text, " are waiting already (prediction.max_queue)");
  } else {
    absl::StrAppend(&text, " and others, of ", queue_.bytes() + aside_bytes_,
                    " bytes together, are waiting already; there is room for ",
                    options_.max_queue_bytes);
  }
  return WithRetryAfter(absl::ResourceExhaustedError(text),
                        rate_.RetryDelay(static_cast<int>(waiting), now));
}

int64_t Predictor::BytesOf(const WaitingRequest& item) {
  size_t bytes = 0;
  for (const PredictionRequest::Input& input : item.request.inputs) {
    for (const auto& part : input.parts) bytes += part.size();
  }
  return static_cast<int64_t>(bytes) + (item.cached == nullptr ? 0 : item.cached->bytes());
}

absl::Status Predictor::Draining() {
  return absl::UnavailableError("this prediction server is draining");
}

absl::Status Predictor::StillWanted(const WaitingRequest& item, absl::Time now) {
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

void Predictor::RemoveDead(absl::Time now, Taken* taken) {
  std::vector<Item> dead =
      queue_.RemoveIf([now](const WaitingRequest& item) { return !StillWanted(item, now).ok(); });
  for (auto parked = parked_.begin(); parked != parked_.end();) {
    const auto next = std::next(parked);
    if (!StillWanted(*parked->second, now).ok()) {
      aside_bytes_ -= parked->second->bytes;
      dead.push_back(std::move(parked->second));
      parked_.erase(parked);
    }
    parked = next;
  }
  for (auto complete = complete_.begin(); complete != complete_.end();) {
    if (StillWanted(*complete->item, now).ok()) {
      ++complete;
      continue;
    }
    aside_bytes_ -= complete->item->bytes;
    dead.push_back(std::move(complete->item));
    complete = complete_.erase(complete);
  }
  for (Item& item : dead) {
    absl::Status status = StillWanted(*item, now);
    if (status.ok()) status = absl::CancelledError("the caller was not there for a moment");
    taken->failed.push_back({std::move(item), std::move(status)});
  }
  swept_ = now;
}

bool Predictor::FindRoom(const std::string& client, int64_t bytes, absl::Time now, Taken* taken) {
  if (queue_.HasRoom(client, bytes, aside_bytes_)) return true;
  if (now - swept_ < kSweepInterval) return false;
  RemoveDead(now, taken);
  return queue_.HasRoom(client, bytes, aside_bytes_);
}

bool Predictor::HasRoomAside(size_t waiting, int64_t bytes) const {
  const int64_t others = queue_.bytes() + aside_bytes_;
  return waiting < static_cast<size_t>(options_.max_queue) &&
         (others == 0 || bytes <= options_.max_queue_bytes - others);
}

absl::Status Predictor::CheckRoom(const std::string& client, int64_t bytes) {
  const absl::Time now = options_.clock->Now();
  Taken taken;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    const bool aside =
        cache_ != nullptr && HasRoomAside(parked_.size() + resumed_.size(), /*bytes=*/0);
    if (!aside && !FindRoom(client, bytes, now, &taken)) status = Refusal(queue_.size(), now);
  }
  FinishFailed(std::move(taken.failed));
  if (!status.ok()) metrics_.Answered(status, absl::ZeroDuration(), now);
  return status;
}

void Predictor::Predict(PredictionRequest request, Done done) {
  // Before anything is looked at closely.
  auto item = std::make_unique<WaitingRequest>();
  item->arrived = options_.clock->Now();
  item->request = std::move(request);
  item->done = std::move(done);
  if (absl::Status room = CheckRoom(item->request.client, BytesOf(*item)); !room.ok()) {
    return item->done(std::move(room));
  }
  absl::StatusOr<RequestPlan> plan = CheckRequest(options_.config, item->request);
  absl::Status status = plan.status();
  status.Update(Ready(item->request.version));
  if (!status.ok()) return Finish(std::move(item), std::move(status));
  item->plan = *std::move(plan);
  status = CheckOutputBytes(options_.config, item->request, item->plan,
                            std::max<int64_t>(1, rows_per_example_), options_.outputs);
  if (!status.ok()) return Finish(std::move(item), std::move(status));
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
  item->bytes = BytesOf(*item);
  {
    MutexLock lock(&mu_);
    if (draining_ && !item->accepted) {
      taken.failed.push_back({std::move(item), Draining()});
    } else if (!FindRoom(item->request.client, item->bytes, item->arrived, &taken)) {
      taken.failed.push_back({std::move(item), Refusal(queue_.size(), options_.clock->Now())});
    } else {
      if (!std::exchange(item->accepted, true)) ++unanswered_;
      if (!std::exchange(item->open, true)) policy_.Came(item->arrived);
      Item displaced = queue_.Push(std::move(item), aside_bytes_);
      if (displaced != nullptr) {
        taken.failed.push_back(
            {std::move(displaced), Refusal(queue_.size(), options_.clock->Now())});
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
