#include "predserver/model_repository.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/status.h"

namespace codistill {

absl::StatusOr<std::unique_ptr<ModelRepository>> ModelRepository::Create(Options options) {
  ComputePool::Options pool;
  pool.threads = options.compute_threads;
  pool.spin = options.spin;
  pool.clock = options.clock;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ComputePool> threads,
                             ComputePool::Create(std::move(pool)));
  return std::unique_ptr<ModelRepository>(new ModelRepository(options, std::move(threads)));
}

ModelRepository::ModelRepository(Options options, std::unique_ptr<ComputePool> pool)
    : options_(options), pool_(std::move(pool)) {}

ModelRepository::~ModelRepository() { Drain(); }

absl::Status ModelRepository::Add(Predictor::Options model) {
  const std::string name = model.model;
  if (models_.count(name) > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("model ", name, " is given twice; one server has one model of a name"));
  }
  model.pool = pool_.get();
  model.metrics = options_.metrics;
  model.clock = options_.clock;
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Predictor> predictor,
                             Predictor::Create(std::move(model)));
  in_order_.push_back(predictor.get());
  models_[name] = std::move(predictor);
  return absl::OkStatus();
}

absl::StatusOr<Predictor*> ModelRepository::Find(const std::string& model) const {
  const auto found = models_.find(model);
  if (found != models_.end()) return found->second.get();
  const std::string names =
      absl::StrJoin(in_order_, ", ", [](std::string* out, const Predictor* predictor) {
        absl::StrAppend(out, "\"", predictor->model(), "\"");
      });
  return absl::NotFoundError(
      absl::StrCat("no model \"", model, "\" here; this server has ", names));
}

void ModelRepository::Predict(PredictionRequest request, Predictor::Done done) {
  const absl::StatusOr<Predictor*> predictor = Find(request.model);
  if (!predictor.ok()) return done(predictor.status());
  (*predictor)->Predict(std::move(request), std::move(done));
}

absl::Status ModelRepository::Ready() const {
  for (const Predictor* predictor : in_order_) {
    const absl::Status ready = predictor->Ready("");
    if (!ready.ok()) return Annotate(ready, absl::StrCat("model ", predictor->model()));
  }
  return absl::OkStatus();
}

void ModelRepository::FillStatus(DaemonStatus* status) const {
  std::vector<std::string> details;
  bool waiting = false, draining = false;
  double rate = 0;
  for (const Predictor* predictor : in_order_) {
    ServedModelStatus* const model = status->add_models();
    predictor->FillStatus(model);
    rate += predictor->Rate();
    waiting = waiting || model->held_size() == 0;
    draining = draining || predictor->draining();
    details.push_back(in_order_.size() == 1
                          ? predictor->Detail()
                          : absl::StrCat(predictor->model(), ": ", predictor->Detail()));
  }
  status->set_state(draining ? "draining" : waiting ? "waiting" : "serving");
  status->set_detail(absl::StrJoin(details, "; "));
  status->set_rate(rate);
  status->set_rate_unit("requests/s");
  if (status->models_size() > 0) {
    status->set_step(status->models(0).version().step());
    status->set_generation(status->models(0).version().generation());
  }
}

void ModelRepository::Drain() {
  for (Predictor* predictor : in_order_) predictor->Drain();
}

}  // namespace codistill
