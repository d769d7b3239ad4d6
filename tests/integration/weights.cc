#include "tests/integration/weights.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/checkpoint/safetensors.h"
#include "common/config/shard_map.h"

namespace codistill {
namespace {

// Tests compare weights of jobs they have made alike: anything else is a mistake of the test.
void RequireSameTensors(const Weights& a, const Weights& b) {
  bool same = a.tensors.size() == b.tensors.size() && !a.tensors.empty();
  for (size_t i = 0; same && i < a.tensors.size(); ++i) {
    same = a.tensors[i].name == b.tensors[i].name &&
           a.tensors[i].tensor.dtype() == b.tensors[i].tensor.dtype() &&
           a.tensors[i].tensor.shape() == b.tensors[i].tensor.shape();
  }
  if (same) return;
  std::fprintf(stderr, "the two sets of weights are not of one model (%zu and %zu tensors)\n",
               a.tensors.size(), b.tensors.size());
  std::abort();
}

}  // namespace

const Tensor* Weights::Find(const std::string& name) const {
  for (const NamedTensor& named : tensors) {
    if (named.name == name) return &named.tensor;
  }
  return nullptr;
}

absl::StatusOr<Weights> PullWeights(const GroupRef& group, const GroupState& state,
                                    TensorClient::Source source, int64_t step,
                                    absl::Time deadline) {
  TensorClient::Options options;
  options.group = group;
  options.shard_map = state.shard_map();
  options.shard_addresses.assign(state.shard_addresses().begin(), state.shard_addresses().end());
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<TensorClient> client,
                             TensorClient::Create(std::move(options)));
  Weights weights;
  std::vector<TensorView> views;
  for (const TensorSpec& spec : state.shard_map().tensors()) {
    TensorView view;
    view.name = spec.name();
    view.dtype = spec.dtype();
    view.shape.assign(spec.shape().begin(), spec.shape().end());
    if (spec.role() != TensorSpec::TIED) {
      NamedTensor named{spec.name(), Tensor::Zeros(spec.dtype(), view.shape)};
      view.data = named.tensor.data();
      weights.tensors.push_back(std::move(named));
    }
    views.push_back(std::move(view));
  }
  CODISTILL_ASSIGN_OR_RETURN(
      const TensorClient::PullResult result,
      client->Pull(source, state.version().generation(), step, views, deadline));
  weights.version = result.version;
  return weights;
}

std::string FirstBitDifference(const Weights& a, const Weights& b) {
  RequireSameTensors(a, b);
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    const Tensor& x = a.tensors[i].tensor;
    const Tensor& y = b.tensors[i].tensor;
    if (std::memcmp(x.data(), y.data(), x.bytes()) == 0) continue;
    if (x.dtype() != DT_FLOAT) return absl::StrCat(a.tensors[i].name, " (not FP32)");
    for (int64_t j = 0; j < x.elements(); ++j) {
      const float* p = &x.As<float>()[j];
      const float* q = &y.As<float>()[j];
      if (std::memcmp(p, q, sizeof(float)) == 0) continue;
      char text[128];
      std::snprintf(text, sizeof(text), "[%lld]: %.9g and %.9g", static_cast<long long>(j), *p, *q);
      return absl::StrCat(a.tensors[i].name, text);
    }
  }
  return "";
}

double RelativeDifference(const Weights& a, const Weights& b) {
  RequireSameTensors(a, b);
  double worst = 0;
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    if (a.tensors[i].tensor.dtype() != DT_FLOAT) continue;
    const absl::Span<const float> x = a.tensors[i].tensor.As<float>();
    const absl::Span<const float> y = b.tensors[i].tensor.As<float>();
    double scale = 0;
    double difference = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      // A NaN must come out as a difference, which max() would lose.
      if (!std::isfinite(x[j]) || !std::isfinite(y[j])) return INFINITY;
      scale = std::max<double>(scale, std::abs(x[j]));
      difference = std::max<double>(difference, std::abs(static_cast<double>(x[j]) - y[j]));
    }
    if (difference > 0) worst = std::max(worst, difference / scale);
  }
  return worst;
}

absl::StatusOr<Weights> ReadSafetensors(const std::string& path) {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsReader> reader,
                             SafetensorsReader::Open(path));
  Weights weights;
  for (const auto& [name, entry] : reader->entries()) {
    NamedTensor named{name, Tensor::Zeros(entry.dtype, entry.shape)};
    CODISTILL_RETURN_IF_ERROR(reader->Read(name, 0, entry.bytes, named.tensor.data()));
    weights.tensors.push_back(std::move(named));
  }
  return weights;
}

absl::Status CopyInto(const Weights& weights, absl::Span<const TensorView> storage) {
  for (const TensorView& view : storage) {
    const Tensor* tensor = weights.Find(view.name);
    if (tensor == nullptr) return absl::NotFoundError(absl::StrCat("no values of ", view.name));
    if (tensor->bytes() != view.bytes()) {
      return absl::InvalidArgumentError(
          absl::StrCat(view.name, ": ", tensor->bytes(), " bytes for a tensor of ", view.bytes()));
    }
    std::memcpy(view.data, tensor->data(), tensor->bytes());
  }
  return absl::OkStatus();
}

}  // namespace codistill
