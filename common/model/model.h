#ifndef CODISTILL_COMMON_MODEL_MODEL_H_
#define CODISTILL_COMMON_MODEL_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"
#include "proto/model.pb.h"

namespace codistill {

// A TorchScript archive in memory: its weights as plain memory, its forward and backward pass. No
// type of libtorch shows. The JIT's graph optimisation is off, so that gradients appear while the
// backward pass runs, but for Predict where it is asked for. Not thread-safe, except Predict, which
// may run in several threads while nobody writes weights.
class Model {
 public:
  struct Options {
    std::string archive;  // path of the .pt file
    // Inputs, states, num_outputs, as forward() has them: ForwardConfig (common/config/embedding.h)
    // of a job's model.
    ModelConfig config;
    std::string device = "cpu";  // or "cuda:N" (common/base/device.h)
    int threads = 1;             // of libtorch in this process
    // BF16: Forward and Backward compute in automatic mixed precision. Weights, gradients, states
    // and running statistics are fp32 all the same.
    Precision precision = FP32;
    // BF16: the same for Predict; its logits and states are fp32. It is not optimised then.
    Precision predict_precision = FP32;
    // Predict runs with the JIT's graph optimisation on, which makes a pass over few examples
    // cheaper. The archive is compiled for it while it loads; the bits of a pass may then differ
    // from those of a model without.
    bool optimize_predict = false;
    // Sets of weights and buffers, 1 or 2: with two, the next weights can come in while passes use
    // the others. Each takes a model's memory.
    int weight_sets = 1;
  };
  // NOT_FOUND / DATA_LOSS name the file. INVALID_ARGUMENT: forward()'s arguments are not the job's
  // inputs and states (names both), or a trial pass on zeros does not give [rows, num_outputs]
  // logits, or fails in the precision that is asked for.
  static absl::StatusOr<std::unique_ptr<Model>> Load(Options options);
  virtual ~Model() = default;

  // A model for inference that says what `model` says with the weights it has now, which are
  // compiled in (torch::jit::optimize_for_inference: batch norms are folded into convolutions,
  // weights are laid out as their kernels want them); sums may be rounded otherwise. It keeps
  // `model`, whose tensors() and storage() it has: nobody may write there while it lives. Reads the
  // archive again and takes a second copy of what is laid out anew. Only Predict, for any number of
  // threads. UNIMPLEMENTED if `model` is not an archive that Load has read, FAILED_PRECONDITION if
  // libtorch cannot compile it, or the file is another one by now.
  static absl::StatusOr<std::shared_ptr<const Model>> Compile(std::shared_ptr<const Model> model);

  // All parameters, then all buffers, with roles, as models/export.py lists them.
  virtual const TensorList& tensors() const = 0;
  // Where each lives, by index in tensors(). Writing there changes the model. TIED entries view the
  // storage of the tensor they are tied to.
  virtual absl::Span<const TensorView> storage() const = 0;

  // Sets of weights and buffers that there is memory for (Options.weight_sets).
  virtual int weight_sets() const { return 1; }
  // As storage(), of set `set`; storage() is that of the set in use. Passes neither read nor write
  // the other set, so that any thread may write there meanwhile.
  virtual absl::Span<const TensorView> storage(int /*set*/) const { return storage(); }
  // From now on passes compute with this set, at first 0, and with what is in it now: to be called
  // when a set has been written, the one in use too. Not between a Forward and its Backward. Where
  // the model computes on a device this brings them there, unless WeightsWritten has.
  virtual absl::Status UseWeights(int /*set*/) { return absl::OkStatus(); }
  // Brings a set that has been written to the device ahead of the UseWeights that will follow, and
  // returns when it may be written again. Any thread, but not during a pass that uses the set,
  // which would see some of it. Does nothing where the model computes on the host.
  virtual absl::Status WeightsWritten(int /*set*/) { return absl::OkStatus(); }

  // Where passes compute, and where Forward's logits and Backward's gradient are: kHostDevice or a
  // CUDA device (common/base/device.h). storage(), Predict's logits, states and the gradients of
  // parameters and inputs are the host's in any case. With errors of a CUDA device see
  // cuda_errors.h.
  virtual int device() const { return kHostDevice; }
  // On a CUDA device: the stream (a cudaStream_t) on which passes of training are queued.
  virtual void* stream() const { return nullptr; }
  // Memory of the model's device for what is computed between Forward and Backward, on stream().
  virtual absl::StatusOr<Tensor> Allocate(DataType dtype, std::vector<int64_t> shape) {
    return Tensor::Allocate(dtype, std::move(shape));
  }
  // A copy of `tensor` on the model's device, for use on stream(). It is brought through pinned
  // memory without waiting for it. `tensor` itself where the model computes on the host.
  virtual absl::StatusOr<Tensor> ToDevice(const Tensor& tensor) { return tensor; }

  // After Forward: returns when storage() has the buffers as that pass has left them.
  virtual absl::Status AwaitBuffers() { return absl::OkStatus(); }
  // Says that a pass will take these inputs, so that they can be brought to the device while others
  // compute. Any thread; never waits for the device.
  virtual void Stage(absl::Span<const Tensor> /*inputs*/) {}

  // Recurrent state of a batch, by index in config.states; empty = zeros.
  using States = std::vector<Tensor>;
  static constexpr int kNoState = 0;

  // Logits of one forward pass: [rows, num_outputs], rows = examples x labels an example. FP32, but
  // BF16 where Forward computes in mixed precision and that is what comes out.
  struct Logits {
    Tensor values;
    int64_t rows = 0;
  };

  // Inference: eval mode, no gradient. `inputs` in the job's order. `states` (in and out) may be
  // null for models without.
  virtual absl::StatusOr<Logits> Predict(absl::Span<const Tensor> inputs, States* states) const = 0;

  // Training: train mode, keeps the graph for one Backward. `seed` drives dropout.
  virtual absl::StatusOr<Logits> Forward(absl::Span<const Tensor> inputs, States* states,
                                         uint64_t seed) = 0;

  // Called with the gradient of parameter `index` (index in tensors()) as soon as it is complete,
  // from the backward pass; `owner` keeps the data alive. A parameter the loss does not depend on
  // comes last, with zeros. FROZEN parameters never come.
  using OnGradient =
      std::function<void(int index, const float* data, std::shared_ptr<const void> owner)>;
  // `gradient`: d loss / d logits of the last Forward, in their shape and type. It may be called
  // once for each Forward.
  virtual absl::Status Backward(const Tensor& gradient, const OnGradient& on_gradient) = 0;

  // As Backward, but nobody is given the gradients of the parameters: they are kept, and the next
  // Accumulate or Backward adds its own to them, in place. For a batch that is computed in parts.
  virtual absl::Status Accumulate(const Tensor& /*gradient*/) {
    return absl::UnimplementedError("this model is not trained in parts");
  }
  // Forgets what Accumulate has kept, where the parts have come to nothing.
  virtual void ForgetGradients() {}

  // After Backward or Accumulate: its gradient with respect to input `index` of that Forward, FP32
  // of the input's shape, zeros where the logits do not depend on it. Only for inputs with an
  // embedding_table; empty for others. Valid until the next Forward.
  virtual Tensor InputGradient(int /*index*/) const { return Tensor(); }

 protected:
  // Compile(self), where `self` holds this.
  virtual absl::StatusOr<std::shared_ptr<const Model>> DoCompile(
      std::shared_ptr<const Model> /*self*/) const {
    return absl::UnimplementedError("only an archive can be compiled");
  }
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_MODEL_H_
