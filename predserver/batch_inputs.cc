#include "predserver/batch_inputs.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/model/inputs.h"

namespace codistill {
namespace {

// Reads the bytes of an input's parts one after the other.
class PartReader {
 public:
  explicit PartReader(const PredictionRequest::Input& input) : parts_(input.parts) {}

  void Read(char* to, size_t bytes) {
    while (bytes > 0) {
      const size_t count = Run(bytes);
      std::memcpy(to, parts_[part_].data() + offset_, count);
      offset_ += count;
      to += count;
      bytes -= count;
    }
  }
  void Skip(size_t bytes) {
    while (bytes > 0) {
      const size_t count = Run(bytes);
      offset_ += count;
      bytes -= count;
    }
  }

 private:
  // Bytes that can be had at once, `bytes` at most.
  size_t Run(size_t bytes) {
    while (offset_ == parts_[part_].size()) {
      ++part_;
      offset_ = 0;
    }
    return std::min(bytes, parts_[part_].size() - offset_);
  }

  const std::vector<absl::Span<const uint8_t>>& parts_;
  size_t part_ = 0;
  size_t offset_ = 0;
};

// Where the examples of a tensor are: `outer` blocks of examples x `inner` bytes.
struct Layout {
  int64_t outer = 1;
  size_t inner = 0;
};

Layout LayoutOf(DataType dtype, absl::Span<const int64_t> shape, int dimension) {
  Layout layout;
  layout.inner = ElementSize(dtype);
  for (int i = 0; i < static_cast<int>(shape.size()); ++i) {
    if (i < dimension) layout.outer *= shape[i];
    if (i > dimension) layout.inner *= static_cast<size_t>(shape[i]);
  }
  return layout;
}

// Assembles one tensor of a batch from all requests.
class Column {
 public:
  Column(DataType dtype, std::vector<int64_t> shape, int dimension, int64_t examples)
      : dtype_(dtype),
        shape_(std::move(shape)),
        layout_(LayoutOf(dtype, shape_, dimension)),
        examples_(examples) {}

  // The only request of its batch, whose memory can be used as it is.
  bool Share(const WaitingRequest& request, const PredictionRequest::Input& input) {
    if (!request.only.empty() || input.parts.size() != 1) return false;
    const uint8_t* data = input.parts[0].data();
    if (reinterpret_cast<uintptr_t>(data) % ElementSize(dtype_) != 0) return false;
    // A model does not write into its arguments.
    tensor_ = Tensor::Adopt(dtype_, shape_, const_cast<uint8_t*>(data), request.request.owner);
    return true;
  }

  // Puts a request's examples behind those of the ones before, and checks them; null: zeros.
  absl::Status Put(const WaitingRequest& request, const PredictionRequest::Input* input) {
    if (tensor_.empty()) tensor_ = Tensor::Allocate(dtype_, shape_);
    const size_t bytes = static_cast<size_t>(request.examples()) * layout_.inner;
    absl::Status status;
    if (input == nullptr) {
      for (int64_t o = 0; o < layout_.outer; ++o) std::memset(At(o), 0, bytes);
    } else if (request.only.empty()) {
      PartReader reader(*input);
      for (int64_t o = 0; o < layout_.outer; ++o) {
        reader.Read(At(o), bytes);
        status.Update(CheckValues(input->name, dtype_, At(o), bytes));
      }
    } else {
      PutSome(request, *input);
      status = CheckValues(input->name, dtype_, At(0), bytes);
    }
    filled_ += request.examples();
    return status;
  }

  const Tensor& tensor() const { return tensor_; }

 private:
  char* At(int64_t outer) {
    return static_cast<char*>(tensor_.data()) +
           static_cast<size_t>(outer * examples_ + filled_) * layout_.inner;
  }
  // Only where examples come one after the other.
  void PutSome(const WaitingRequest& request, const PredictionRequest::Input& input) {
    PartReader reader(input);
    char* to = At(0);
    int32_t next = 0;
    for (const int32_t example : request.only) {
      reader.Skip(static_cast<size_t>(example - next) * layout_.inner);
      reader.Read(to, layout_.inner);
      to += layout_.inner;
      next = example + 1;
    }
  }

  const DataType dtype_;
  const std::vector<int64_t> shape_;
  const Layout layout_;
  const int64_t examples_;  // of the batch
  int64_t filled_ = 0;
  Tensor tensor_;
};

// `index(request)`: where in the request's inputs the column's is, or -1.
template <typename Index>
Tensor Fill(Column column, absl::Span<const WaitingRequest* const> requests, const Index& index,
            std::vector<absl::Status>* statuses) {
  if (requests.size() == 1 && index(*requests[0]) >= 0) {
    const PredictionRequest::Input& input = requests[0]->request.inputs[index(*requests[0])];
    if (column.Share(*requests[0], input)) {
      const Tensor& tensor = column.tensor();
      (*statuses)[0].Update(CheckValues(input.name, tensor.dtype(), tensor.data(), tensor.bytes()));
      return tensor;
    }
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const int place = index(*requests[i]);
    const PredictionRequest::Input* input =
        place < 0 ? nullptr : &requests[i]->request.inputs[place];
    (*statuses)[i].Update(column.Put(*requests[i], input));
  }
  return column.tensor();
}

}  // namespace

int BatchDimension(const RecurrentState& state) {
  return static_cast<int>(std::find(state.shape().begin(), state.shape().end(), -1) -
                          state.shape().begin());
}

BatchInputs AssembleBatch(const ModelConfig& config,
                          absl::Span<const WaitingRequest* const> requests,
                          std::vector<absl::Status>* statuses) {
  statuses->assign(requests.size(), absl::OkStatus());
  BatchInputs batch;
  for (const WaitingRequest* request : requests) batch.examples += request->examples();
  for (int i = 0; i < config.inputs_size(); ++i) {
    const ModelInput& input = config.inputs(i);
    std::vector<int64_t> shape = {batch.examples};
    shape.insert(shape.end(), input.shape().begin(), input.shape().end());
    batch.inputs.push_back(Fill(
        Column(input.dtype(), std::move(shape), 0, batch.examples), requests,
        [i](const WaitingRequest& request) { return request.plan.inputs[i]; }, statuses));
  }
  batch.states.resize(config.states_size());
  for (int i = 0; i < config.states_size(); ++i) {
    const auto index = [i](const WaitingRequest& request) { return request.plan.states[i]; };
    if (std::all_of(requests.begin(), requests.end(),
                    [&](const WaitingRequest* request) { return index(*request) < 0; })) {
      continue;
    }
    const RecurrentState& state = config.states(i);
    batch.states[i] = Fill(
        Column(DT_FLOAT, StateShape(state, batch.examples), BatchDimension(state), batch.examples),
        requests, index, statuses);
  }
  return batch;
}

Tensor RowRange(const Tensor& tensor, int64_t begin, int64_t count) {
  std::vector<int64_t> shape = tensor.shape();
  const size_t row = LayoutOf(tensor.dtype(), shape, 0).inner;
  shape[0] = count;
  char* data = static_cast<char*>(const_cast<void*>(tensor.data())) + begin * row;
  return Tensor::Adopt(tensor.dtype(), std::move(shape), data, tensor.owner());
}

Tensor StateRange(const Tensor& state, int dimension, int64_t begin, int64_t count) {
  std::vector<int64_t> shape = state.shape();
  const int64_t examples = shape[dimension];
  if (begin == 0 && count == examples) return state;
  const Layout layout = LayoutOf(state.dtype(), shape, dimension);
  shape[dimension] = count;
  const char* from = static_cast<const char*>(state.data()) + begin * layout.inner;
  if (layout.outer == 1) {
    return Tensor::Adopt(state.dtype(), std::move(shape), const_cast<char*>(from), state.owner());
  }
  Tensor range = Tensor::Allocate(state.dtype(), std::move(shape));
  char* to = static_cast<char*>(range.data());
  for (int64_t o = 0; o < layout.outer; ++o) {
    std::memcpy(to, from + o * examples * layout.inner, count * layout.inner);
    to += count * layout.inner;
  }
  return range;
}

}  // namespace codistill
