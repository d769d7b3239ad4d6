// The baseline of worker_overhead: the same archive, the same batches, and nothing but libtorch
// around them. forward, cross-entropy, backward and an SGD step in a loop.
//
//   bare_loop JOB DATA_DIR BATCHES CHUNK_ROWS OPTIMIZE [DEVICE]
//
// JOB is a resolved job file; the batches of its first group's first BATCHES steps are made before
// anything is timed. CHUNK_ROWS > 0 takes the loss over so many rows at a time (a smaller piece
// stays in the cache); OPTIMIZE 1 leaves the JIT's graph optimisation on. With a DEVICE
// the BATCHES are taken again and again, each copied there from pinned memory while the one
// before is computed, nobody waits for a step before the last, and with training.precision BF16
// forward and loss run under autocast. Then, for each line "N"
// on stdin, runs N steps and answers with one line of JSON: seconds, and the loss of each step.

#include <ATen/autocast_mode.h>
#include <malloc.h>
#include <time.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/torch.h>
#include <torch/version.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/tuned_start.h"
#include "common/config/job.h"
#include "nlohmann/json.hpp"
#include "worker/data/dataset.h"
#include "worker/dataset_batches.h"

namespace codistill {
namespace {

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "bare_loop: %s\n", value.status().ToString().c_str());
  std::exit(1);
}

// Of this process, all threads.
double ProcessorSeconds() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

// A copy in torch's own memory.
at::Tensor ToTorch(const Tensor& tensor) {
  const at::ScalarType type = tensor.dtype() == DT_INT64 ? at::kLong : at::kFloat;
  return torch::from_blob(const_cast<void*>(tensor.data()), tensor.shape(), type).clone();
}

// libtorch's automatic mixed precision in bfloat16, while it lives.
class Autocast {
 public:
  Autocast(bool on, at::DeviceType type) : on_(on), type_(type) {
    if (!on_) return;
    at::autocast::increment_nesting();
    Set(true);
  }
  ~Autocast() {
    if (!on_) return;
    Set(false);
    at::autocast::decrement_nesting();
    at::autocast::clear_cache();
  }

 private:
  void Set(bool on) {
#if TORCH_VERSION_MAJOR >= 2
    at::autocast::set_autocast_dtype(type_, at::kBFloat16);
    at::autocast::set_autocast_enabled(type_, on);
#else
    if (type_ == at::kCPU) {
      at::autocast::set_autocast_cpu_dtype(at::kBFloat16);
      at::autocast::set_cpu_enabled(on);
    } else {
      at::autocast::set_autocast_gpu_dtype(at::kBFloat16);
      at::autocast::set_enabled(on);
    }
#endif
  }

  const bool on_;
  const at::DeviceType type_;
};

struct TorchBatch {
  std::vector<at::Tensor> inputs;
  at::Tensor labels;
};

class BareLoop {
 public:
  BareLoop(const JobConfig& job, const std::string& data_dir, int batches, int64_t chunk_rows,
           const std::string& device)
      : chunk_rows_(chunk_rows),
        device_(device.empty() ? "cpu" : device),
        again_(!device.empty()),
        precision_(job.training().precision()),
        learning_rate_(job.training().optimizer().learning_rate()),
        module_(torch::jit::load(ArchivePath(job, 0))) {
    module_.to(device_);
    module_.train();
    for (const at::Tensor& parameter : module_.parameters()) parameters_.push_back(parameter);

    DatasetOptions options;
    options.job = &job;
    options.data_dir = data_dir;
    const std::unique_ptr<Dataset> dataset = Must(CreateDataset(options));
    DatasetBatches source(job.model(), dataset.get(), TrainingOrder(job, 0, *dataset));
    const int64_t size = job.training().batch_size();
    for (int i = 0; i < batches; ++i) {
      const StudentBatch batch = Must(source.Build(i * size, size));
      TorchBatch made;
      for (const Tensor& input : batch.inputs) made.inputs.push_back(ToTorch(input));
      made.labels = ToTorch(batch.labels).flatten();
      if (!device_.is_cpu()) {
        for (at::Tensor& input : made.inputs) input = input.pin_memory();
        made.labels = made.labels.pin_memory();
      }
      batches_.push_back(std::move(made));
    }
    for (const RecurrentState& state : job.model().states()) {
      std::vector<int64_t> shape(state.shape().begin(), state.shape().end());
      for (int64_t& dimension : shape) dimension = dimension < 0 ? size : dimension;
      states_.push_back(torch::zeros(shape, device_));
    }
  }

  std::vector<double> Run(int steps) {
    std::vector<at::Tensor> losses;
    for (int i = 0; i < steps; ++i) {
      losses.push_back(Step());
      if (device_.is_cpu()) losses.back() = losses.back().clone();
    }
    std::vector<double> values;
    for (const at::Tensor& loss : losses) values.push_back(loss.item<double>());
    return values;
  }

 private:
  at::Tensor Step() {
    if (next_ >= batches_.size() && again_) next_ = 0;
    if (next_ >= batches_.size()) {
      std::fprintf(stderr, "bare_loop: no more than %zu batches\n", batches_.size());
      std::exit(1);
    }
    TorchBatch batch = batches_[next_++];
    if (!device_.is_cpu()) {
      for (at::Tensor& input : batch.inputs) input = input.to(device_, /*non_blocking=*/true);
      batch.labels = batch.labels.to(device_, /*non_blocking=*/true);
    }
    // As long as the loss is computed.
    auto mixed = std::make_unique<Autocast>(precision_ == BF16, device_.type());
    std::vector<torch::jit::IValue> arguments;
    for (const at::Tensor& input : batch.inputs) arguments.emplace_back(input);
    for (const at::Tensor& state : states_) arguments.emplace_back(state);
    const torch::jit::IValue output = module_.forward(std::move(arguments));
    at::Tensor logits =
        output.isTensor() ? output.toTensor() : output.toTuple()->elements()[0].toTensor();
    for (size_t i = 0; i < states_.size(); ++i) {
      states_[i] = output.toTuple()->elements()[i + 1].toTensor().detach();
    }
    logits = logits.reshape({-1, logits.size(-1)});
    at::Tensor loss;
    if (chunk_rows_ > 0 && chunk_rows_ < logits.size(0)) {
      const std::vector<at::Tensor> labels = batch.labels.split(chunk_rows_);
      const std::vector<at::Tensor> rows = logits.split(chunk_rows_);
      for (size_t i = 0; i < rows.size(); ++i) {
        const at::Tensor part =
            torch::nn::functional::cross_entropy(
                rows[i], labels[i],
                torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kSum)) /
            logits.size(0);
        loss = loss.defined() ? loss + part : part;
      }
    } else {
      loss = torch::nn::functional::cross_entropy(logits, batch.labels);
    }
    mixed.reset();
    for (at::Tensor& parameter : parameters_) parameter.mutable_grad().reset();
    loss.backward();
    torch::NoGradGuard no_grad;
    for (at::Tensor& parameter : parameters_) {
      if (parameter.grad().defined()) parameter.add_(parameter.grad(), -learning_rate_);
    }
    return loss.detach();
  }

  const int64_t chunk_rows_;
  const at::Device device_;
  const bool again_;
  const Precision precision_;
  const double learning_rate_;
  torch::jit::Module module_;
  std::vector<at::Tensor> parameters_;
  std::vector<TorchBatch> batches_;
  std::vector<at::Tensor> states_;
  size_t next_ = 0;
};

int Main(int argc, char** argv) {
  if (argc != 6 && argc != 7) {
    std::fprintf(stderr, "usage: bare_loop JOB DATA_DIR BATCHES CHUNK_ROWS OPTIMIZE [DEVICE]\n");
    return 2;
  }
  // As the product does: with malloc's defaults large tensors fault in anew on every call.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  at::set_num_threads(1);
  at::set_num_interop_threads(1);
  torch::jit::setGraphExecutorOptimize(std::atoi(argv[5]) != 0);
  BareLoop loop(Must(LoadJob(argv[1])), argv[2], std::atoi(argv[3]), std::atoi(argv[4]),
                argc == 7 ? argv[6] : "");
  std::printf("{\"ready\": true}\n");
  std::fflush(stdout);

  int steps = 0;
  while (std::cin >> steps) {
    const double cpu = ProcessorSeconds();
    const auto start = std::chrono::steady_clock::now();
    const std::vector<double> losses = loop.Run(steps);
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    const nlohmann::json answer = {{"seconds", spent.count()},
                                   {"processor_seconds", ProcessorSeconds() - cpu},
                                   {"losses", losses}};
    std::printf("%s\n", answer.dump().c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RestartTuned(argv);
  return codistill::Main(argc, argv);
}
