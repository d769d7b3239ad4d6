// From the queue through a forward pass to predictions, on the threads of the pool.

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/base/status.h"
#include "predserver/output_format.h"
#include "predserver/predictor.h"

namespace codistill {
namespace {

// A pass is not cut into smaller ones than this to keep other threads busy: reading the weights
// would cost more than is won.
constexpr int64_t kLeastShare = 16;

// Bytes of logits, with a row an example, above which it is found out first how many rows there
// are.
constexpr int64_t kMostUnknown = 1 << 20;

// One example's rows of logits; 0 if that cannot be said.
int64_t CountRows(const ModelConfig& config, const Model& model) {
  std::vector<Tensor> inputs;
  for (const ModelInput& input : config.inputs()) {
    std::vector<int64_t> shape = {1};
    shape.insert(shape.end(), input.shape().begin(), input.shape().end());
    inputs.push_back(Tensor::Zeros(input.dtype(), std::move(shape)));
  }
  Model::States states(config.states_size());
  const absl::StatusOr<Model::Logits> logits = model.Predict(inputs, &states);
  return logits.ok() ? logits->rows : 0;
}

Tensor OwnCopy(const Tensor& tensor) {
  if (tensor.empty()) return tensor;
  Tensor copy = Tensor::Allocate(tensor.dtype(), tensor.shape());
  std::memcpy(copy.data(), tensor.data(), tensor.bytes());
  return copy;
}

// An answer may wait long to be read. One that is a small part of its pass does not keep the
// memory of the whole.
void LetGoOfPass(const WaitingRequest& item, int64_t examples_of_pass, Computed* computed) {
  if (4 * item.examples() >= examples_of_pass) return;
  // Cached rows among others, and other formats, are copies anyway.
  if (item.only.empty() && item.plan.want_logits && item.request.format.dtype == DT_FLOAT) {
    computed->logits = OwnCopy(computed->logits);
  }
  for (Tensor& state : computed->states) state = OwnCopy(state);
}

}  // namespace

void Predictor::TakeBatch(const ComputePool::Situation& situation, absl::Time now, Taken* taken) {
  int64_t most = options_.max_batch_size;
  const bool shared = situation.idle_threads > 0 && !situation.others_waiting;
  if (shared) {
    const int64_t threads = situation.idle_threads + 1;
    most = std::min(most, std::max(kLeastShare, (queue_.examples() + threads - 1) / threads));
  }
  // The first is taken whatever it has: it has been held against the limits.
  const int64_t rows = rows_per_example_;
  const int64_t row_bytes =
      static_cast<int64_t>(options_.config.num_outputs()) * static_cast<int64_t>(sizeof(float));
  most = std::min(most, rows == 0 ? kMostUnknown / row_bytes
                                  : options_.outputs.logits_bytes / (rows * row_bytes));
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
  ProceedWithResumed();
  ComputePool::Offer offer;
  auto complete = std::make_shared<Complete>();
  auto taken = std::make_shared<Taken>();
  const absl::Time now = options_.clock->Now();
  {
    MutexLock lock(&mu_);
    RemoveDead(now, taken.get());
    const auto take_complete = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      *complete = std::move(complete_.front());
      complete_.pop_front();
      complete_next_ = false;
      aside_bytes_ -= complete->item->bytes;
      offer.more = !complete_.empty() || queue_.size() > 0;
    };
    if (!complete_.empty() && (complete_next_ || queue_.size() == 0)) {
      take_complete();
    } else if (queue_.size() > 0) {
      const absl::Time start =
          draining_ ? now : policy_.StartAt(queue_.size(), queue_.examples(), now);
      if (start > now && !complete_.empty()) {
        take_complete();
      } else if (start > now) {
        offer.again = start;
      } else {
        TakeBatch(situation, now, taken.get());
        complete_next_ = true;
        offer.more = queue_.size() > 0 || !complete_.empty();
        if (taken->items.empty() && offer.more) offer.again = now;
      }
    } else {
      policy_.StopWaiting();
    }
  }
  FinishFailed(std::move(taken->failed));
  if (!taken->items.empty()) offer.pass = [this, taken] { Compute(taken.get()); };
  if (complete->item != nullptr) {
    offer.pass = [this, complete] {
      absl::StatusOr<Prediction> prediction = MakeCached(*complete->item, complete->precision);
      Finish(std::move(complete->item), std::move(prediction));
    };
  }
  return offer;
}

void Predictor::RefuseTooLarge(Taken* taken) {
  if (rows_per_example_ != 0) return;
  const int64_t row_bytes =
      static_cast<int64_t>(options_.config.num_outputs()) * static_cast<int64_t>(sizeof(float));
  int64_t examples = 0;
  for (const Item& item : taken->items) examples += item->examples();
  if (examples == 1 || examples * row_bytes <= kMostUnknown) return;
  rows_per_example_ = CountRows(options_.config, *taken->snapshot->model);
  std::vector<Item> fit;
  std::vector<Failed> large;
  for (Item& item : taken->items) {
    absl::Status status =
        CheckOutputBytes(options_.config, item->request, item->plan,
                         std::max<int64_t>(1, rows_per_example_), options_.outputs);
    if (status.ok()) {
      fit.push_back(std::move(item));
    } else {
      large.push_back({std::move(item), std::move(status)});
    }
  }
  taken->items = std::move(fit);
  {
    MutexLock lock(&mu_);
    policy_.Computed(static_cast<int>(large.size()));
  }
  FinishFailed(std::move(large));
}

void Predictor::Compute(Taken* taken) {
  RefuseTooLarge(taken);
  if (taken->items.empty()) return;
  std::vector<Item>& items = taken->items;
  const FollowedModel::Snapshot& snapshot = *taken->snapshot;
  std::vector<const WaitingRequest*> requests;
  absl::Time waiting_since = absl::InfiniteFuture();
  absl::Duration queued;
  int64_t examples = 0;
  for (const Item& item : items) {
    requests.push_back(item.get());
    waiting_since = std::min(waiting_since, item->arrived);
    queued += item->taken - item->arrived;
    examples += item->examples();
  }
  std::vector<PassTimes> passes;
  std::vector<absl::StatusOr<Computed>> computed =
      ComputeBatch(options_.config, *snapshot.model, requests, options_.clock, &passes);

  const absl::Time computed_at = options_.clock->Now();
  std::vector<absl::StatusOr<Prediction>> predictions(items.size());
  std::vector<Item> unfinished;  // with cached rows, which are not all there yet
  std::vector<std::unique_ptr<CachedRows>> claims;
  for (size_t i = 0; i < items.size(); ++i) {
    if (computed[i].ok()) {
      rows_per_example_ = computed[i]->logits.shape()[0] / items[i]->examples();
      LetGoOfPass(*items[i], examples, &*computed[i]);
    }
    if (!computed[i].ok()) {
      predictions[i] = computed[i].status();
    } else if (items[i]->cached == nullptr) {
      predictions[i] = MakePrediction(*items[i], *computed[i], snapshot.version, snapshot.loaded_at,
                                      snapshot.precision);
    } else if (!items[i]->cached->Take(computed[i]->logits, snapshot.version, snapshot.loaded_at)) {
      claims.push_back(std::move(items[i]->cached));
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
    if (items[i] == nullptr) continue;
    if (items[i]->cached != nullptr) claims.push_back(std::move(items[i]->cached));
    Finish(std::move(items[i]), std::move(predictions[i]));
  }
  // Those who waited for this pass come after those who were in it.
  claims.clear();
  for (Item& item : unfinished) {
    if (item->cached != nullptr) item->cached->GiveUp();
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

}  // namespace codistill
