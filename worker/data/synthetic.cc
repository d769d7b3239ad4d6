// A classification task without files: SyntheticConfig in proto/job.proto. Every number is a
// function of what it is for, so that every process that asks for the same task gets the same
// examples.

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/random.h"
#include "worker/data/labelling_network.h"
#include "worker/data/sources.h"

namespace codistill {
namespace {

// A draw from softmax(scale * logits).
int64_t Sample(const std::vector<float>& logits, double scale, double uniform) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const float logit : logits) total += std::exp(scale * (logit - largest));
  double left = uniform * total;
  for (size_t c = 0; c + 1 < logits.size(); ++c) {
    left -= std::exp(scale * (logits[c] - largest));
    if (left < 0) return static_cast<int64_t>(c);
  }
  return static_cast<int64_t>(logits.size()) - 1;
}

class SyntheticDataset : public Dataset {
 public:
  SyntheticDataset(const DatasetConfig& config, LabelLoss loss, Shape shape, uint64_t salt,
                   std::vector<float> x, std::vector<int64_t> labels)
      : Dataset(config, loss, std::move(shape)),
        inputs_(config.synthetic().inputs()),
        salt_(salt),
        x_(std::move(x)),
        labels_(std::move(labels)) {}

  static absl::StatusOr<std::unique_ptr<Dataset>> Create(const DatasetOptions& options) {
    const SyntheticConfig& config = internal::ConfigOf(options).synthetic();
    const LabellingNetwork network(config);
    const int64_t inputs = config.inputs();
    std::vector<float> x(config.examples() * inputs);
    std::vector<int64_t> labels(config.examples());
    const uint64_t stream = Mix(config.seed(), HashString("examples"), config.stream());
    ParallelFor(options.threads, config.examples(), /*grain=*/256, [&](int64_t begin, int64_t end) {
      LabellingNetwork::Scratch scratch;
      for (int64_t i = begin; i < end; ++i) {
        float* example = x.data() + i * inputs;
        for (int64_t j = 0; j < inputs; ++j) {
          example[j] = static_cast<float>(NormalDouble(Mix(stream, i, j)));
        }
        const std::vector<float>& logits = network.Logits(example, &scratch);
        RandomStream random(Mix(stream, HashString("label"), i));
        const double noise = random.Uniform(), choice = random.Uniform();
        if (noise < config.label_noise()) {
          labels[i] = static_cast<int64_t>(random.Below(config.classes()));
        } else if (config.sample_labels()) {
          labels[i] = Sample(logits, config.logit_scale(), choice);
        } else {
          labels[i] = std::max_element(logits.begin(), logits.end()) - logits.begin();
        }
      }
    });
    Shape shape;
    shape.size = config.examples();
    shape.num_classes = config.classes();
    shape.summary =
        absl::StrCat(config.examples(), " synthetic examples of ", inputs, " inputs and ",
                     config.classes(), " classes, stream ", config.stream());
    return std::make_unique<SyntheticDataset>(
        internal::ConfigOf(options), options.job->model().label_loss(), std::move(shape),
        Mix(stream, config.stream()), std::move(x), std::move(labels));
  }

  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    Allocate(static_cast<int64_t>(refs.size()), batch);
    float* to = batch->fields[0].tensor.As<float>().data();
    const auto ids = batch->example_ids.As<int64_t>();
    for (size_t i = 0; i < refs.size(); ++i, to += inputs_) {
      const int64_t index = refs[i].index;
      std::copy_n(x_.data() + index * inputs_, inputs_, to);
      SetClass(static_cast<int64_t>(i), labels_[index], batch);
      ids[i] = static_cast<int64_t>(Mix(salt_, index));
    }
    return absl::OkStatus();
  }

  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) ++counts[labels_[ref.index]];
  }

 private:
  const int64_t inputs_;
  const uint64_t salt_;
  const std::vector<float> x_;  // [examples, inputs]
  const std::vector<int64_t> labels_;
};

}  // namespace

namespace internal {

absl::StatusOr<std::unique_ptr<Dataset>> CreateSynthetic(const DatasetOptions& options) {
  return SyntheticDataset::Create(options);
}

}  // namespace internal
}  // namespace codistill
