#include "common/model/model_compiler.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "glog/logging.h"

namespace codistill {
namespace {

// Batches that are compared and timed: a lone request, and one of several examples.
constexpr int64_t kRows[] = {1, 8};
// Passes of a model and a batch that are timed at most, and for how long.
constexpr int kPasses = 7;
constexpr absl::Duration kTiming = absl::Milliseconds(250);
// What compiling has to win with one of the batches, and may lose with the other. Each version
// costs a tenth of a second beside the requests of that time, which little gain does not pay for.
constexpr double kGain = 0.8;
constexpr double kLoss = 1.02;
// Less than this is nothing beside what a request costs anyway.
constexpr double kLeastSeconds = 50e-6;
// Of the absolute value plus one: sums in another order.
constexpr float kTolerance = 1e-3f;

// Floats between -1 and 1, always the same; other types are 0, which is always a valid index.
std::vector<Tensor> Examples(const ModelConfig& config, int64_t rows) {
  std::vector<Tensor> inputs;
  uint32_t state = 1;
  for (const ModelInput& input : config.inputs()) {
    std::vector<int64_t> shape = {rows};
    shape.insert(shape.end(), input.shape().begin(), input.shape().end());
    inputs.push_back(Tensor::Zeros(input.dtype(), std::move(shape)));
    if (input.dtype() != DT_FLOAT) continue;
    for (float& value : inputs.back().As<float>()) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1;
    }
  }
  return inputs;
}

bool IsNear(const Tensor& got, const Tensor& want) {
  if (got.shape() != want.shape()) return false;
  const auto* const x = static_cast<const float*>(got.data());
  const auto* const y = static_cast<const float*>(want.data());
  for (int64_t i = 0; i < want.elements(); ++i) {
    if (!std::isfinite(x[i]) && !std::isfinite(y[i])) continue;
    if (!(std::abs(x[i] - y[i]) <= kTolerance * (1 + std::abs(y[i])))) return false;
  }
  return true;
}

double PassSeconds(const Model& model, const std::vector<Tensor>& inputs) {
  Model::States states;
  const absl::Time start = absl::Now();
  (void)model.Predict(inputs, &states);
  return absl::ToDoubleSeconds(absl::Now() - start);
}

}  // namespace

ModelCompiler::ModelCompiler(ModelConfig forward, std::string name)
    : forward_(std::move(forward)), name_(std::move(name)) {}

std::string ModelCompiler::Difference(const Model& model, const Model& compiled,
                                      int64_t rows) const {
  const std::vector<Tensor> inputs = Examples(forward_, rows);
  Model::States want_states;
  const absl::StatusOr<Model::Logits> want = model.Predict(inputs, &want_states);
  // Nothing to compare with; such a version is judged elsewhere.
  if (!want.ok()) return "";
  // libtorch records the first pass, compiles at the second, and the third is what will be run.
  for (int pass = 0; pass < 3; ++pass) {
    Model::States states;
    const absl::StatusOr<Model::Logits> got = compiled.Predict(inputs, &states);
    if (!got.ok()) return std::string(got.status().message());
    bool near = IsNear(got->values, want->values);
    for (size_t i = 0; i < want_states.size(); ++i) near &= IsNear(states[i], want_states[i]);
    if (!near) return absl::StrCat("it says something else for ", rows, " examples");
  }
  return "";
}

bool ModelCompiler::IsFaster(const Model& model, const Model& compiled) const {
  bool gains = false;
  for (const int64_t rows : kRows) {
    const std::vector<Tensor> inputs = Examples(forward_, rows);
    // The fastest of each: whatever else runs meanwhile can only add.
    double plain = std::numeric_limits<double>::infinity(), best = plain;
    const absl::Time end = absl::Now() + kTiming;
    for (int pass = 0; pass < kPasses && (pass == 0 || absl::Now() < end); ++pass) {
      plain = std::min(plain, PassSeconds(model, inputs));
      best = std::min(best, PassSeconds(compiled, inputs));
    }
    LOG(INFO) << "model " << name_ << ": a pass over " << rows << " examples takes " << 1e3 * plain
              << " ms, compiled for its weights " << 1e3 * best << " ms";
    if (best > kLoss * plain) return false;
    gains |= best < kGain * plain && plain - best >= kLeastSeconds;
  }
  return gains;
}

std::shared_ptr<const Model> ModelCompiler::Compile(std::shared_ptr<const Model> model) {
  if (choice_ == Choice::kLeave) return model;
  absl::StatusOr<std::shared_ptr<const Model>> compiled = Model::Compile(model);
  std::string problem(compiled.status().message());
  for (const int64_t rows : kRows) {
    // Once it is known to work, a lone example is enough to warm a version up.
    if (problem.empty() && (choice_ == Choice::kOpen || rows == 1)) {
      problem = Difference(*model, **compiled, rows);
    }
  }
  if (!problem.empty()) {
    LOG(WARNING) << "model " << name_ << ": passes stay as they are, because compiling them for "
                 << "the weights failed: " << problem;
    choice_ = Choice::kLeave;
    return model;
  }
  if (choice_ == Choice::kOpen) {
    choice_ = IsFaster(*model, **compiled) ? Choice::kCompile : Choice::kLeave;
  }
  return choice_ == Choice::kCompile ? *std::move(compiled) : model;
}

}  // namespace codistill
