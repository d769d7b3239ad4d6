#include "common/model/embedding_model.h"

#include <utility>

#include "common/base/status.h"
#include "common/model/inputs.h"
#include "common/model/row_batch.h"

namespace codistill {
namespace {

class EmbeddingModel final : public Model {
 public:
  EmbeddingModel(ModelConfig config, std::shared_ptr<const Model> model,
                 std::vector<std::shared_ptr<const FollowedRows>> tables)
      : config_(std::move(config)), model_(std::move(model)), tables_(std::move(tables)) {}

  const TensorList& tensors() const override { return model_->tensors(); }
  absl::Span<const TensorView> storage() const override { return model_->storage(); }

  absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const override {
    CODISTILL_RETURN_IF_ERROR(CheckInputs(config_, inputs));
    const std::vector<RowBatch> batches = FindRows(config_, inputs);
    std::vector<std::vector<float>> rows(batches.size());
    std::vector<const float*> pointers;
    for (size_t i = 0; i < batches.size(); ++i) {
      rows[i].resize(batches[i].floats());
      tables_[batches[i].table]->Find(batches[i].keys, rows[i].data());
      pointers.push_back(rows[i].data());
    }
    return model_->Predict(GatherRows(inputs, batches, pointers), states);
  }

  absl::StatusOr<Logits> Forward(absl::Span<const Tensor>, States*, uint64_t) override {
    return absl::UnimplementedError("a followed model is not trained");
  }
  absl::Status Backward(const Tensor&, const OnGradient&) override {
    return absl::UnimplementedError("a followed model is not trained");
  }

 private:
  const ModelConfig config_;
  const std::shared_ptr<const Model> model_;
  const std::vector<std::shared_ptr<const FollowedRows>> tables_;
};

}  // namespace

std::shared_ptr<const Model> WithRows(const ModelConfig& config, std::shared_ptr<const Model> model,
                                      std::vector<std::shared_ptr<const FollowedRows>> tables) {
  return std::make_shared<EmbeddingModel>(config, std::move(model), std::move(tables));
}

}  // namespace codistill
