#include "worker/batch_part.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/model/inputs.h"

namespace codistill {
namespace {

// A state [outer, batch, inner] in row-major order.
struct StateLayout {
  int64_t outer = 1;
  size_t inner_bytes = sizeof(float);
};

StateLayout LayoutOf(const RecurrentState& state) {
  StateLayout layout;
  bool before = true;
  for (const int64_t size : state.shape()) {
    if (size == -1) {
      before = false;
    } else if (before) {
      layout.outer *= size;
    } else {
      layout.inner_bytes *= static_cast<size_t>(size);
    }
  }
  return layout;
}

char* Bytes(Tensor* tensor) { return static_cast<char*>(tensor->data()); }
const char* Bytes(const Tensor& tensor) { return static_cast<const char*>(tensor.data()); }

}  // namespace

std::vector<BatchPart> SplitBatch(int64_t examples, int64_t rows, int64_t parts) {
  const int64_t rows_each = rows / examples;
  parts = std::clamp<int64_t>(parts, 1, examples);
  std::vector<BatchPart> out;
  for (int64_t i = 0; i < parts; ++i) {
    BatchPart part;
    part.first = examples * i / parts;
    part.examples = examples * (i + 1) / parts - part.first;
    part.first_row = part.first * rows_each;
    part.rows = part.examples * rows_each;
    out.push_back(part);
  }
  return out;
}

Tensor Slice(const Tensor& tensor, int64_t total, int64_t first, int64_t count) {
  if (tensor.empty()) return tensor;
  std::vector<int64_t> shape = tensor.shape();
  if (shape.empty() || shape[0] != total) shape = {total, tensor.elements() / total};
  shape[0] = count;
  const size_t each = tensor.bytes() / static_cast<size_t>(total);
  char* const data = const_cast<char*>(Bytes(tensor)) + static_cast<size_t>(first) * each;
  return Tensor::Adopt(tensor.dtype(), std::move(shape), data, tensor.owner());
}

TopKPrediction Slice(const TopKPrediction& prediction, int64_t total, int64_t first,
                     int64_t count) {
  return {Slice(prediction.index, total, first, count),
          Slice(prediction.value, total, first, count),
          Slice(prediction.tail, total, first, count)};
}

Model::States CutStates(const ModelConfig& config, const Model::States& states,
                        const BatchPart& part) {
  Model::States out;
  for (size_t i = 0; i < states.size(); ++i) {
    const RecurrentState& state = config.states(static_cast<int>(i));
    if (states[i].empty()) {
      out.emplace_back();
      continue;
    }
    if (states[i].shape() == StateShape(state, part.examples)) {
      out.push_back(states[i]);
      continue;
    }
    const auto [outer, inner] = LayoutOf(state);
    const size_t batch = states[i].bytes() / static_cast<size_t>(outer) / inner;
    Tensor cut = Tensor::Allocate(DT_FLOAT, StateShape(state, part.examples));
    const size_t bytes = static_cast<size_t>(part.examples) * inner;
    for (int64_t o = 0; o < outer; ++o) {
      std::memcpy(Bytes(&cut) + static_cast<size_t>(o) * bytes,
                  Bytes(states[i]) +
                      (static_cast<size_t>(o) * batch + static_cast<size_t>(part.first)) * inner,
                  bytes);
    }
    out.push_back(std::move(cut));
  }
  return out;
}

void PutStates(const ModelConfig& config, const BatchPart& part, const Model::States& states,
               int64_t examples, Model::States* whole) {
  if (part.examples == examples) {
    *whole = states;
    return;
  }
  whole->resize(states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    const RecurrentState& state = config.states(static_cast<int>(i));
    Tensor& to = (*whole)[i];
    if (to.empty()) to = Tensor::Allocate(DT_FLOAT, StateShape(state, examples));
    const auto [outer, inner] = LayoutOf(state);
    const size_t bytes = static_cast<size_t>(part.examples) * inner;
    for (int64_t o = 0; o < outer; ++o) {
      std::memcpy(Bytes(&to) + (static_cast<size_t>(o) * static_cast<size_t>(examples) +
                                static_cast<size_t>(part.first)) *
                                   inner,
                  Bytes(states[i]) + static_cast<size_t>(o) * bytes, bytes);
    }
  }
}

void PutExamples(const BatchPart& part, const Tensor& tensor, int64_t examples, Tensor* whole) {
  if (part.examples == examples) {
    *whole = tensor;
    return;
  }
  if (tensor.empty()) return;
  if (whole->empty()) {
    std::vector<int64_t> shape = tensor.shape();
    shape[0] = examples;
    *whole = Tensor::Allocate(tensor.dtype(), std::move(shape));
  }
  std::memcpy(Bytes(whole) + tensor.bytes() / static_cast<size_t>(part.examples) *
                                 static_cast<size_t>(part.first),
              tensor.data(), tensor.bytes());
}

}  // namespace codistill
