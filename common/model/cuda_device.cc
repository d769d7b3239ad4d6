// A model on a CUDA device. Three streams: on one passes of training are computed, on one what they
// will take is brought there, on one what they gave is brought back, so that both ways are under
// way while the device computes. Each pass of Predict has a stream of its own. All of the host's
// memory in this is pinned: only then does a copy not stop the thread that asks for it.
//
// Memory of the device that is written on one stream and read on another is kept until an event
// says that the reader is done, or told to the allocator (record_stream).

#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/device.h"
#include "common/base/mutex.h"
#include "common/model/copy_courier.h"
#include "common/model/model_device.h"
#include "common/model/staged_inputs.h"
#include "common/model/torch_support.h"

namespace codistill::internal {
namespace {

using at::cuda::CUDAEvent;
using c10::cuda::CUDAGuard;
using c10::cuda::CUDAStream;
using c10::cuda::CUDAStreamGuard;

// Where tensors begin in a slab; what cudaMalloc gives at least.
constexpr size_t kAlignment = 256;
// Of the device's memory, for inputs that are brought there ahead of their pass.
constexpr int64_t kStagedShare = 16;
// Gradients of so many earlier passes may still be on their way to the shards when the next begin
// to come. More than weights_lag + 1 never are, unless somebody keeps them.
constexpr int64_t kHeldPasses = 3;
constexpr absl::Duration kHeldWait = absl::Seconds(60);

// A thread that waits for it sleeps.
constexpr unsigned kSleeping = cudaEventDisableTiming | cudaEventBlockingSync;

at::Tensor Pinned(at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, at::TensorOptions().dtype(type).pinned_memory(true));
}

class CudaScope final : public ModelDevice::Scope {
 public:
  explicit CudaScope(CUDAStream stream) : guard_(stream) {}

 private:
  CUDAStreamGuard guard_;
};

// Streams for passes that do not wait for one another.
class StreamPool {
 public:
  explicit StreamPool(c10::DeviceIndex device) : device_(device) {}
  CUDAStream Take() {
    {
      MutexLock lock(&mu_);
      if (!free_.empty()) {
        const CUDAStream stream = free_.back();
        free_.pop_back();
        return stream;
      }
    }
    return c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_);
  }
  void Return(CUDAStream stream) {
    MutexLock lock(&mu_);
    free_.push_back(stream);
  }

 private:
  const c10::DeviceIndex device_;
  Mutex mu_;
  std::vector<CUDAStream> free_ ABSL_GUARDED_BY(mu_);
};

class PredictScope final : public ModelDevice::Scope {
 public:
  PredictScope(StreamPool* pool, CUDAStream stream)
      : pool_(pool), stream_(stream), guard_(stream) {}
  // What was queued has ended: Bring has waited for it. After an error nothing is used again.
  ~PredictScope() override { pool_->Return(stream_); }

 private:
  StreamPool* const pool_;
  const CUDAStream stream_;
  CUDAStreamGuard guard_;
};

class CudaDevice final : public ModelDevice {
 public:
  CudaDevice(c10::DeviceIndex device, int64_t memory)
      : device_(at::kCUDA, device),
        // Ahead of passes of teachers on the same device.
        compute_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)),
        upload_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)),
        download_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)),
        predict_(device),
        staged_(memory / kStagedShare) {}

  ~CudaDevice() override {
    // Memory may go only when nobody reads or writes it. A lost device has let go of everything.
    const CUDAGuard guard(device_);
    for (const CUDAStream& stream : {compute_, upload_, download_}) {
      static_cast<void>(cudaStreamSynchronize(stream));
    }
  }

  at::Device device() const override { return device_; }
  void* stream() const override { return compute_.stream(); }

  std::unique_ptr<Scope> Train() override { return std::make_unique<CudaScope>(compute_); }
  std::unique_ptr<Scope> Predict() override {
    return std::make_unique<PredictScope>(&predict_, predict_.Take());
  }

  void Hold(ModuleTensors* tensors) override;
  void WeightsWritten(int set) override;
  void UseWeights(int set) override;
  at::Tensor Take(const Tensor& input) override;
  at::Tensor Send(const Tensor& tensor) override;
  void Stage(absl::Span<const Tensor> inputs) override;
  Tensor Adopt(const at::Tensor& tensor) override;
  Tensor Bring(const at::Tensor& tensor) override;
  void FetchBuffers() override;
  void AwaitBuffers() override;
  absl::Status BeginGradients(const Model::OnGradient* on_gradient) override;
  void Deliver(int index, at::Tensor gradient) override;
  absl::Status EndGradients() override;

 private:
  struct Staged {
    at::Tensor tensor;
    std::shared_ptr<CUDAEvent> here;
  };
  struct GradientEvents {
    CUDAEvent computed;
    CUDAEvent copied{kSleeping};
  };

  // A copy on the current stream, for which this thread does not wait.
  at::Tensor Upload(const Tensor& input) const;
  // The same on the stream of its own, and how the current one waits for it.
  Staged SendAhead(const Tensor& tensor) const;
  at::Tensor Receive(const Staged& staged) const;

  const at::Device device_;
  const CUDAStream compute_, upload_, download_;
  StreamPool predict_;
  StagedInputs<Staged> staged_;

  // All tensors one after another, in the host's memory and in the device's: one copy brings all.
  struct WeightSet {
    at::Tensor host, device;
    CUDAEvent last_pass;              // that has been queued with what is in the set
    CUDAEvent here{kSleeping};        // the last copy
    std::atomic<bool> fresh = false;  // WeightsWritten since the last UseWeights

    char* host_bytes() const { return static_cast<char*>(host.data_ptr()); }
    char* device_bytes() const { return static_cast<char*>(device.data_ptr()); }
  };
  std::vector<WeightSet> sets_;
  std::atomic<int> in_use_ = 0;
  size_t slab_bytes_ = 0;
  size_t buffers_begin_ = 0;  // buffers come last
  CUDAEvent buffers_written_, buffers_here_{kSleeping};
  bool buffers_under_way_ = false;

  int64_t gradient_bytes_ = 0;
  const Model::OnGradient* on_gradient_ = nullptr;
  std::vector<GradientEvents> gradient_events_;  // by tensor
  HeldBytes held_;
  CopyCourier courier_;  // goes first: it uses the rest
};

void CudaDevice::Hold(ModuleTensors* tensors) {
  const int count = tensors->list().tensors_size();
  std::vector<size_t> offsets(count);
  size_t bytes = 0;
  bool seen_buffer = false;
  for (int i = 0; i < count; ++i) {
    const TensorSpec& spec = tensors->list().tensors(i);
    if (spec.role() == TensorSpec::BUFFER && !std::exchange(seen_buffer, true)) {
      buffers_begin_ = bytes;
    }
    if (spec.role() == TensorSpec::TIED) continue;
    offsets[i] = bytes;
    const size_t size = tensors->views()[i].bytes();
    bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    if (spec.role() == TensorSpec::PARAMETER) gradient_bytes_ += static_cast<int64_t>(size);
  }
  if (!seen_buffer) buffers_begin_ = bytes;
  const std::unique_ptr<Scope> scope = Train();
  const torch::NoGradGuard no_grad;
  slab_bytes_ = std::max(bytes, kAlignment);
  sets_ = std::vector<WeightSet>(tensors->sets());
  for (int s = 0; s < tensors->sets(); ++s) {
    WeightSet& set = sets_[s];
    set.host = Pinned({static_cast<int64_t>(slab_bytes_)}, at::kByte);
    set.device = at::empty({static_cast<int64_t>(slab_bytes_)},
                           at::TensorOptions().dtype(at::kByte).device(device_));
    for (int i = 0; i < count; ++i) {
      if (tensors->list().tensors(i).role() == TensorSpec::TIED) continue;
      const at::Tensor data = tensors->data(s, i);
      if (data.numel() > 0) {
        std::memcpy(set.host_bytes() + offsets[i], data.data_ptr(), tensors->views()[i].bytes());
      }
      const at::Tensor view = at::from_blob(
          set.device_bytes() + offsets[i], data.sizes(), [slab = set.device](void*) {},
          at::TensorOptions().dtype(data.scalar_type()).device(device_), device_);
      tensors->Move(s, i, view, set.host_bytes() + offsets[i]);
    }
    WeightsWritten(s);
  }
  gradient_events_ = std::vector<GradientEvents>(count);
}

void CudaDevice::WeightsWritten(int set) {
  WeightSet& written = sets_[set];
  const CUDAStreamGuard guard(upload_);
  // Passes that are queued still compute with what was in the set: all of them, if it is the one in
  // use, else those up to the time when it was that.
  if (set == in_use_) written.last_pass.record(compute_);
  written.last_pass.block(upload_);
  C10_CUDA_CHECK(cudaMemcpyAsync(written.device_bytes(), written.host_bytes(), slab_bytes_,
                                 cudaMemcpyHostToDevice, upload_));
  written.here.record(upload_);
  written.here.synchronize();
  written.fresh = true;
}

void CudaDevice::UseWeights(int set) {
  // What another thread has brought meanwhile it did not begin before that set was out of use.
  if (!sets_[set].fresh.exchange(false)) {
    WeightsWritten(set);
    sets_[set].fresh = false;
  }
  if (set == in_use_) return;
  sets_[in_use_].last_pass.record(compute_);
  in_use_ = set;
}

at::Tensor CudaDevice::Upload(const Tensor& input) const {
  const at::ScalarType type = ToTorchType(input.dtype());
  at::Tensor tensor = at::empty(input.shape(), at::TensorOptions().dtype(type).device(device_));
  if (tensor.numel() == 0) return tensor;
  const at::Tensor pinned = Pinned(input.shape(), type);
  std::memcpy(pinned.data_ptr(), input.data(), input.bytes());
  // libtorch lets others have the pinned memory only when this copy has ended.
  tensor.copy_(pinned, /*non_blocking=*/true);
  return tensor;
}

at::Tensor CudaDevice::Take(const Tensor& input) {
  if (input.device() == device_.index()) {
    return at::from_blob(
        const_cast<void*>(input.data()), input.shape(), [owner = input.owner()](void*) {},
        at::TensorOptions().dtype(ToTorchType(input.dtype())).device(device_), device_);
  }
  const torch::NoGradGuard no_grad;
  std::optional<Staged> staged = staged_.Take(input);
  return staged.has_value() ? Receive(*staged) : Upload(input);
}

at::Tensor CudaDevice::Send(const Tensor& tensor) {
  const torch::NoGradGuard no_grad;
  return Receive(SendAhead(tensor));
}

CudaDevice::Staged CudaDevice::SendAhead(const Tensor& tensor) const {
  const CUDAStreamGuard guard(upload_);
  Staged staged;
  staged.tensor = Upload(tensor);
  staged.here = std::make_shared<CUDAEvent>();
  staged.here->record(upload_);
  return staged;
}

at::Tensor CudaDevice::Receive(const Staged& staged) const {
  const CUDAStream current = c10::cuda::getCurrentCUDAStream(device_.index());
  staged.here->block(current);
  staged.tensor.record_stream(current);
  return staged.tensor;
}

void CudaDevice::Stage(absl::Span<const Tensor> inputs) {
  const torch::NoGradGuard no_grad;
  for (const Tensor& input : inputs) {
    if (input.device() != kHostDevice || !staged_.Reserve(input)) continue;
    try {
      staged_.Put(input, SendAhead(input));
    } catch (const std::exception&) {
      // Its pass will try again, and tell.
      staged_.GiveUp(input);
    }
  }
}

Tensor CudaDevice::Adopt(const at::Tensor& tensor) {
  auto owner = std::make_shared<at::Tensor>(tensor.detach().contiguous());
  const DataType dtype = FromTorchType(owner->scalar_type());
  std::vector<int64_t> shape = owner->sizes().vec();
  void* const data = owner->data_ptr();
  return Tensor::Adopt(dtype, std::move(shape), data, std::move(owner), device_.index());
}

Tensor CudaDevice::Bring(const at::Tensor& tensor) {
  const torch::NoGradGuard no_grad;
  if (!tensor.is_cuda()) return FromTorch(tensor);
  const at::Tensor source = tensor.detach().contiguous();
  const at::Tensor host = Pinned(source.sizes(), source.scalar_type());
  host.copy_(source, /*non_blocking=*/true);
  c10::cuda::getCurrentCUDAStream(device_.index()).synchronize();
  return FromTorch(host);
}

void CudaDevice::FetchBuffers() {
  if (buffers_begin_ >= slab_bytes_) return;
  const WeightSet& set = sets_[in_use_];
  const CUDAStreamGuard guard(download_);
  buffers_written_.record(compute_);
  buffers_written_.block(download_);
  C10_CUDA_CHECK(cudaMemcpyAsync(set.host_bytes() + buffers_begin_,
                                 set.device_bytes() + buffers_begin_, slab_bytes_ - buffers_begin_,
                                 cudaMemcpyDeviceToHost, download_));
  buffers_here_.record(download_);
  buffers_under_way_ = true;
}

void CudaDevice::AwaitBuffers() {
  if (!std::exchange(buffers_under_way_, false)) return;
  buffers_here_.synchronize();
}

absl::Status CudaDevice::BeginGradients(const Model::OnGradient* on_gradient) {
  on_gradient_ = on_gradient;
  if (held_.AwaitAtMost((kHeldPasses - 1) * gradient_bytes_, absl::Now() + kHeldWait)) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(held_.held(), " bytes of gradients of earlier passes are still held after ",
                   absl::FormatDuration(kHeldWait), "; pinned memory has an end"));
}

void CudaDevice::Deliver(int index, at::Tensor gradient) {
  struct Copied {
    at::Tensor host;
    std::shared_ptr<const void> held;
  };
  const torch::NoGradGuard no_grad;
  auto copied = std::make_shared<Copied>();
  copied->held = held_.Hold(static_cast<int64_t>(gradient.nbytes()));
  CopyCourier::Copy copy;
  if (gradient.is_cuda()) {
    // In the backward pass this is the stream of the parameter, on which the sum was computed.
    const CUDAStream current = c10::cuda::getCurrentCUDAStream(device_.index());
    GradientEvents& events = gradient_events_[index];
    events.computed.record(current);
    const CUDAStreamGuard guard(download_);
    events.computed.block(download_);
    copied->host = Pinned(gradient.sizes(), at::kFloat);
    copied->host.copy_(gradient, /*non_blocking=*/true);
    events.copied.record(download_);
    // The gradient's memory is kept until it has been read.
    copy.await = [&events, gradient = std::move(gradient)] {
      return CatchTorch(absl::StatusCode::kInternal, "copying a gradient", [&] {
        events.copied.synchronize();
        return absl::OkStatus();
      });
    };
  } else {
    copied->host = std::move(gradient);
    copy.await = [] { return absl::OkStatus(); };
  }
  copy.deliver = [this, index, copied = std::move(copied)] {
    const auto* const data = copied->host.data_ptr<float>();
    (*on_gradient_)(index, data, copied);
  };
  courier_.Add(std::move(copy));
}

absl::Status CudaDevice::EndGradients() {
  const absl::Status status = courier_.Drain();
  on_gradient_ = nullptr;
  return status;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelDevice>> OpenCudaDevice(int ordinal) {
  int count = 0;
  const cudaError_t error = c10::cuda::GetDeviceCount(&count);
  const std::string name = DeviceName(ordinal);
  if (error != cudaSuccess || count == 0) {
    static_cast<void>(cudaGetLastError());
    return absl::FailedPreconditionError(absl::StrCat(
        "device ", name, ": this machine has no CUDA device that can be used",
        error == cudaSuccess
            ? ""
            : absl::StrCat(" (", cudaGetErrorName(error), ": ", cudaGetErrorString(error), ")")));
  }
  if (ordinal >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("device ", name, ": this machine has ", count, " CUDA device",
                     count == 1 ? ", cuda:0" : absl::StrCat("s, cuda:0 to cuda:", count - 1)));
  }
  return CatchTorch(absl::StatusCode::kFailedPrecondition, absl::StrCat("device ", name),
                    [&]() -> absl::StatusOr<std::unique_ptr<ModelDevice>> {
                      const auto index = static_cast<c10::DeviceIndex>(ordinal);
                      at::globalContext().lazyInitDevice(at::kCUDA);
                      const cudaDeviceProp* const properties = at::cuda::getDeviceProperties(index);
                      return std::make_unique<CudaDevice>(
                          index, static_cast<int64_t>(properties->totalGlobalMem));
                    });
}

}  // namespace codistill::internal
