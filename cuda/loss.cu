// LaunchLoss and FinishLoss: which kernel, how it is laid out, and what it found.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "cuda/device.h"
#include "cuda/loss_cuda.h"
#include "cuda/loss_faults.h"
#include "cuda/loss_kernels_cuda.h"
#include "cuda/topk_loss_kernel-inl.h"

namespace codistill {
namespace internal {
namespace {

static_assert(kMaxTeachers == kMaxCudaTeachers);
constexpr int kMostParts = 8;

// Bytes that CUDA itself takes of a block's shared memory.
constexpr int kReservedSharedBytes = 1 << 10;

absl::Status CudaError(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("loss: ", action, ": ", cudaGetErrorName(error), ": ",
                                          cudaGetErrorString(error)));
}

absl::Status Invalid(absl::string_view field, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("loss: ", field, " ", problem));
}

struct DeviceLimits {
  int major, shared_per_block, shared_per_multiprocessor;
};

// Of the current device; asked for once.
absl::StatusOr<DeviceLimits> LimitsOfDevice() {
  constexpr int kDevices = 64;
  static std::mutex mutex;
  static DeviceLimits known[kDevices];  // major 0: not asked yet
  int device = 0;
  CODISTILL_RETURN_IF_ERROR(CudaError(cudaGetDevice(&device), "finding the device"));
  std::lock_guard<std::mutex> lock(mutex);
#ifndef CODISTILL_EMULATED_CUDA  // whose device changes
  if (device < kDevices && known[device].major > 0) return known[device];
#endif
  DeviceLimits limits;
  auto ask = [device](cudaDeviceAttr attribute, int* value) {
    return CudaError(cudaDeviceGetAttribute(value, attribute, device), "asking for the limits");
  };
  CODISTILL_RETURN_IF_ERROR(ask(cudaDevAttrComputeCapabilityMajor, &limits.major));
  CODISTILL_RETURN_IF_ERROR(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits.shared_per_block));
  CODISTILL_RETURN_IF_ERROR(
      ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits.shared_per_multiprocessor));
  if (device < kDevices) known[device] = limits;
  return limits;
}

struct Layout {
  SoftmaxKernel kernel;
  int threads;
  int shared_bytes;
};

// Shared memory for `elements` of an array, with what CopyIn needs besides.
int KeptBytes(int64_t elements, NumberFormat format) {
  return static_cast<int>((elements * static_cast<int64_t>(BytesOf(format)) + 16 + 15) / 16 * 16);
}

// Whole warps with about eight elements a thread, up to `most`.
int ThreadsFor(int64_t elements, int most) {
  return static_cast<int>(std::clamp<int64_t>((elements / 8 + 31) / 32 * 32, 32, most));
}

// Threads of a block for about 1,024 on a multiprocessor, which is what registers allow.
int MostThreads(const DeviceLimits& limits, int shared_bytes, int most) {
  const int blocks = std::max(1, limits.shared_per_multiprocessor /
                                     (shared_bytes + kStaticSharedBytes + kReservedSharedBytes));
  return std::clamp(1024 / blocks / 32 * 32, 256, most);
}

// Several blocks a row, so small that four fit a multiprocessor, or as small as can be, if that
// makes all arrays of the row fit.
bool LayOutKept(const DeviceLimits& limits, NumberFormat format, bool teach, LossParams* params,
                Layout* layout) {
  const int usable = limits.shared_per_block - kStaticSharedBytes;
  const int aim = limits.shared_per_multiprocessor / 4 - kStaticSharedBytes - kReservedSharedBytes;
  const int most = limits.major >= 9 ? kMostParts : 1;
  for (int parts = 1; parts <= most; parts *= 2) {
    // Three more: a row may begin at any place in an aligned four.
    const int64_t elements = ((params->classes + 3 + parts - 1) / parts + 3) / 4 * 4;
    const int logits = KeptBytes(elements, format);
    const int teacher = teach ? KeptBytes(elements, params->dense[0].format) : 0;
    if (logits + teacher > (parts < most ? aim : usable)) continue;
    params->parts = parts;
    params->part_elements = static_cast<int32_t>(elements);
    params->logits_at = 0;
    params->teacher_at[0] = logits;
    layout->shared_bytes = logits + teacher;
    layout->threads = ThreadsFor(elements, MostThreads(limits, layout->shared_bytes, kMaxThreads));
    return true;
  }
  return false;
}

// A block a row, which keeps what fits: first the bitmaps of named classes, then logits, then
// teachers; two blocks a multiprocessor where that does.
absl::Status LayOutRow(const DeviceLimits& limits, NumberFormat format, bool general,
                       LossParams* params, Layout* layout) {
  const int usable = limits.shared_per_block - kStaticSharedBytes;
  const int half = limits.shared_per_multiprocessor / 2 - kStaticSharedBytes - kReservedSharedBytes;
  params->parts = 1;
  params->part_elements = params->classes + 3;
  int bytes = 0;
  if (params->num_topk > 0) {
    params->bitmaps_at = 0;
    bytes = (TopKRow::BitmapBytes(params->classes) + 15) / 16 * 16;
    if (bytes > usable) {
      return Invalid("classes",
                     absl::StrCat("is ", params->classes, "; this device has room for at most ",
                                  usable / 12 * 32, " with topk_teachers"));
    }
  }
  auto keep = [&](NumberFormat of, int limit, int32_t* at) {
    const int more = KeptBytes(params->classes, of);
    if (bytes + more > limit) return false;
    *at = bytes;
    bytes += more;
    return true;
  };
  if (keep(format, half, &params->logits_at)) {
    for (int k = 0; k < params->num_dense; ++k) {
      if (!keep(params->dense[k].format, half, &params->teacher_at[k])) break;
    }
  } else {
    keep(format, usable, &params->logits_at);
  }
  layout->shared_bytes = bytes;
  const int most = general ? kMaxGeneralThreads : 512;
  layout->threads = ThreadsFor(params->classes, most);
  return absl::OkStatus();
}

absl::Status LaunchSoftmax(NumberFormat format, LossParams* params, cudaStream_t stream) {
  CODISTILL_ASSIGN_OR_RETURN(const DeviceLimits limits, LimitsOfDevice());
  const bool teach = params->psi != Psi::kNone;
  const bool one = params->psi == Psi::kMatch && params->num_dense == 1 && params->num_topk == 0;
  params->logits_at = params->bitmaps_at = -1;
  std::fill(std::begin(params->teacher_at), std::end(params->teacher_at), -1);
  Layout layout = {};
  const bool kept = (!teach || one) && LayOutKept(limits, format, teach, params, &layout);
  if (!kept) CODISTILL_RETURN_IF_ERROR(LayOutRow(limits, format, teach && !one, params, &layout));
  const auto choose =
      format == NumberFormat::kFloat32 ? &SoftmaxKernelFloat32 : &SoftmaxKernelBfloat16;
  layout.kernel = choose(teach, one, kept);
  if (layout.shared_bytes > (48 << 10) - kStaticSharedBytes) {
    CODISTILL_RETURN_IF_ERROR(
        CudaError(cudaFuncSetAttribute(layout.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       limits.shared_per_block - kStaticSharedBytes),
                  "asking for shared memory"));
  }
  if (layout.shared_bytes > 0) {
    CODISTILL_RETURN_IF_ERROR(CudaError(
        cudaFuncSetAttribute(layout.kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "asking for shared memory"));
  }
  return CudaError(LaunchClusters(layout.kernel, static_cast<unsigned>(params->parts),
                                  static_cast<unsigned>(params->rows * params->parts),
                                  static_cast<unsigned>(layout.threads),
                                  static_cast<size_t>(layout.shared_bytes), stream, *params),
                   "launching the kernel");
}

absl::Status ValidateForCuda(const LossOptions& options, const LossInputs& inputs) {
  CODISTILL_RETURN_IF_ERROR(ValidateLoss(options, inputs));
  if (inputs.rows > INT32_MAX / kMostParts) {
    return Invalid(
        "rows", absl::StrCat("is ", inputs.rows, "; at most ", INT32_MAX / kMostParts, " on CUDA"));
  }
  if (inputs.classes > INT32_MAX / 64) {
    return Invalid("classes",
                   absl::StrCat("is ", inputs.classes, "; at most ", INT32_MAX / 64, " on CUDA"));
  }
  if (!(inputs.teacher_weight > 0)) return absl::OkStatus();
  if (inputs.teachers.size() > kMaxCudaTeachers) {
    return Invalid("teachers", absl::StrCat("are ", inputs.teachers.size(), "; at most ",
                                            kMaxCudaTeachers, " on CUDA"));
  }
  if (inputs.topk_teachers.size() > kMaxCudaTeachers) {
    return Invalid("topk_teachers", absl::StrCat("are ", inputs.topk_teachers.size(), "; at most ",
                                                 kMaxCudaTeachers, " on CUDA"));
  }
  return absl::OkStatus();
}

int64_t NamedPerRow(const LossInputs& inputs) {
  int64_t sum = 0;
  if (!(inputs.teacher_weight > 0)) return 0;
  for (const TopKTeacher& teacher : inputs.topk_teachers) sum += teacher.k;
  return sum;
}

size_t RowPartsAt() { return (sizeof(LossResult) + 15) / 16 * 16; }
size_t NamedAt(int64_t rows) {
  return RowPartsAt() + static_cast<size_t>(rows) * kMostParts * sizeof(RowPart);
}

LossParams ParamsOf(const LossOptions& options, const LossInputs& inputs, void* gradient,
                    void* workspace) {
  const bool softmax = options.label_loss == LossOptions::kSoftmaxCrossEntropy;
  LossParams params = {};
  params.rows = inputs.rows;
  params.classes = static_cast<int32_t>(inputs.classes);
  params.logits = static_cast<const unsigned char*>(inputs.logits);
  params.gradient = static_cast<unsigned char*>(gradient);
  params.labels = inputs.labels;
  params.targets = inputs.targets;
  params.prior = inputs.label_prior;
  params.row_weights = inputs.row_weights;
  params.has_ignored = options.ignored_label.has_value();
  params.ignored_label = options.ignored_label.value_or(0);
  params.sigmoid = options.label_loss == LossOptions::kSigmoidCrossEntropy;
  params.smoothing = options.label_smoothing;
  params.temperature = options.temperature;
  params.inverse_t = 1 / options.temperature;
  params.power = 1;
  params.parts = 1;
  if (inputs.teacher_weight > 0) {
    params.weight = inputs.teacher_weight * options.temperature;
    for (int power : {2, 3, 4}) {
      if (options.temperature == static_cast<float>(power)) params.power = power;
    }
    if (params.power == 1 && options.temperature != 1) params.power = 0;
    switch (options.teacher_loss) {
      case LossOptions::kSoftCrossEntropy:
        params.psi = Psi::kMatch;
        break;
      case LossOptions::kKlTeacherStudent:
        params.psi = Psi::kMatch;
        params.divergence = true;
        break;
      case LossOptions::kKlStudentTeacher:
        params.psi = Psi::kReverse;
        break;
      case LossOptions::kSquaredErrorLogits:
        params.psi = Psi::kSquared;
        params.weight = inputs.teacher_weight;
        if (softmax) params.weight /= static_cast<float>(inputs.classes);
        break;
    }
    params.num_dense = static_cast<int32_t>(inputs.teachers.size());
    // The average of one is the one.
    params.average_logits = options.teacher_average == LossOptions::kLogits && params.num_dense > 1;
    for (int k = 0; k < params.num_dense; ++k) {
      const DenseTeacher& teacher = inputs.teachers[k];
      params.dense[k] = {static_cast<const unsigned char*>(teacher.values),
                         teacher.format == NumberFormat::kInt8 ? teacher.scale : nullptr,
                         teacher.format, teacher.kind == DenseTeacher::kProbabilities};
    }
    params.num_topk = static_cast<int32_t>(inputs.topk_teachers.size());
    for (int k = 0; k < params.num_topk; ++k) {
      const TopKTeacher& teacher = inputs.topk_teachers[k];
      params.topk[k] = {teacher.index, teacher.value,
                        teacher.k < inputs.classes ? teacher.tail : nullptr, teacher.k};
    }
    params.named_per_row = NamedPerRow(inputs);
  } else {
    params.temperature = params.inverse_t = 1;
  }
  params.prepared = inputs.row_weights != nullptr || params.has_ignored || params.prior != nullptr;
  params.row_scale = params.prepared ? inputs.gradient_scale
                                     : inputs.gradient_scale / static_cast<double>(inputs.rows);
  auto* const memory = static_cast<unsigned char*>(workspace);
  params.result = reinterpret_cast<LossResult*>(memory);
  params.row_parts = reinterpret_cast<RowPart*>(memory + RowPartsAt());
  params.named = reinterpret_cast<NamedClass*>(memory + NamedAt(inputs.rows));
  return params;
}

// Device memory, `count` elements from `at`, on the host.
template <typename T>
absl::Status Fetch(const T* at, int64_t count, cudaStream_t stream, std::vector<T>* host) {
  host->resize(count);
  CODISTILL_RETURN_IF_ERROR(
      CudaError(cudaMemcpyAsync(host->data(), at, static_cast<size_t>(count) * sizeof(T),
                                cudaMemcpyDeviceToHost, stream),
                "fetching an array"));
  return CudaError(cudaStreamSynchronize(stream), "fetching an array");
}

// A label, weight, prior or top-k teacher is not as it must be: says what, by the CPU's checks.
absl::Status DescribeArrayFault(const LossOptions& options, LossInputs inputs,
                                cudaStream_t stream) {
  std::vector<int64_t> labels;
  std::vector<float> weights, prior;
  if (inputs.labels != nullptr) {
    CODISTILL_RETURN_IF_ERROR(Fetch(inputs.labels, inputs.rows, stream, &labels));
    inputs.labels = labels.data();
  }
  if (inputs.row_weights != nullptr) {
    CODISTILL_RETURN_IF_ERROR(Fetch(inputs.row_weights, inputs.rows, stream, &weights));
    inputs.row_weights = weights.data();
  }
  if (inputs.label_prior != nullptr) {
    CODISTILL_RETURN_IF_ERROR(Fetch(inputs.label_prior, inputs.classes, stream, &prior));
    inputs.label_prior = prior.data();
  }
  const size_t teachers = inputs.teacher_weight > 0 ? inputs.topk_teachers.size() : 0;
  std::vector<TopKTeacher> top_k(inputs.topk_teachers.begin(), inputs.topk_teachers.end());
  std::vector<std::vector<int32_t>> indices(teachers);
  std::vector<std::vector<float>> values(teachers), tails(teachers);
  for (size_t t = 0; t < teachers; ++t) {
    TopKTeacher& teacher = top_k[t];
    const int64_t count = inputs.rows * teacher.k;
    CODISTILL_RETURN_IF_ERROR(Fetch(teacher.index, count, stream, &indices[t]));
    CODISTILL_RETURN_IF_ERROR(Fetch(teacher.value, count, stream, &values[t]));
    teacher.index = indices[t].data();
    teacher.value = values[t].data();
    if (teacher.k == inputs.classes) continue;
    CODISTILL_RETURN_IF_ERROR(Fetch(teacher.tail, inputs.rows, stream, &tails[t]));
    teacher.tail = tails[t].data();
  }
  inputs.topk_teachers = top_k;
  CODISTILL_RETURN_IF_ERROR(ValidateArrays(options, inputs, 1));
  return absl::InvalidArgumentError(
      "loss: labels, label_prior, row_weights or topk_teachers held what they must not, and were "
      "written to before FinishLoss");
}

// The row that the pass found something wrong in: says what, as the CPU does.
absl::Status DescribeRowFault(const LossOptions& options, LossInputs inputs,
                              const LossResult& result, cudaStream_t stream) {
  const int64_t row = result.fault_row, classes = inputs.classes;
  // The gradient may have replaced the logits; the kernel has looked before.
  std::vector<float> logits(classes);
  if (result.bad_class >= 0) logits[result.bad_class] = result.bad_logit;
  inputs.logits = logits.data();
  inputs.logits_format = NumberFormat::kFloat32;
  std::vector<float> targets;
  if (inputs.targets != nullptr) {
    CODISTILL_RETURN_IF_ERROR(Fetch(inputs.targets + row * classes, classes, stream, &targets));
    inputs.targets = targets.data();
  }
  std::vector<DenseTeacher> dense(inputs.teachers.begin(), inputs.teachers.end());
  std::vector<std::vector<unsigned char>> values(dense.size());
  std::vector<std::vector<float>> scales(dense.size());
  for (size_t k = 0; inputs.teacher_weight > 0 && k < dense.size(); ++k) {
    const int64_t bytes = classes * static_cast<int64_t>(BytesOf(dense[k].format));
    CODISTILL_RETURN_IF_ERROR(
        Fetch(static_cast<const unsigned char*>(dense[k].values) + row * bytes, bytes, stream,
              &values[k]));
    dense[k].values = values[k].data();
    if (dense[k].format != NumberFormat::kInt8) continue;
    CODISTILL_RETURN_IF_ERROR(Fetch(dense[k].scale + row, 1, stream, &scales[k]));
    dense[k].scale = scales[k].data();
  }
  inputs.teachers = dense;
  inputs.rows = 1;
  const std::string what = FindFault(options, inputs, 0, row, result.fault_finite != 0);
  return absl::InvalidArgumentError(absl::StrCat("loss: ", what));
}

}  // namespace
}  // namespace internal

using internal::LossParams;
using internal::LossResult;

size_t CudaLossWorkspaceBytes(const LossInputs& inputs) {
  return internal::NamedAt(inputs.rows) + static_cast<size_t>(inputs.rows) *
                                              static_cast<size_t>(internal::NamedPerRow(inputs)) *
                                              sizeof(internal::NamedClass);
}

absl::Status LaunchLoss(const LossOptions& options, const LossInputs& inputs, void* gradient,
                        void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(internal::ValidateForCuda(options, inputs));
  if (workspace == nullptr) return absl::InvalidArgumentError("loss: workspace is null");
  LossParams params = internal::ParamsOf(options, inputs, gradient, workspace);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.prepared) {
    CODISTILL_RETURN_IF_ERROR(internal::CudaError(internal::LaunchPrepare(params, cuda_stream),
                                                  "launching the sum of weights"));
  }
  if (options.label_loss == LossOptions::kSoftmaxCrossEntropy) {
    CODISTILL_RETURN_IF_ERROR(internal::LaunchSoftmax(inputs.logits_format, &params, cuda_stream));
  } else {
    CODISTILL_RETURN_IF_ERROR(
        internal::CudaError(internal::LaunchElementwise(params, inputs.logits_format, cuda_stream),
                            "launching the kernel"));
  }
  return internal::CudaError(internal::LaunchSums(params, cuda_stream), "launching the sum");
}

absl::Status FinishLoss(const LossOptions& options, const LossInputs& inputs, const void* workspace,
                        void* stream, LossOutputs* outputs) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  LossResult result;
  CODISTILL_RETURN_IF_ERROR(internal::CudaError(
      cudaMemcpyAsync(&result, workspace, sizeof(result), cudaMemcpyDeviceToHost, cuda_stream),
      "fetching the result"));
  CODISTILL_RETURN_IF_ERROR(internal::CudaError(cudaStreamSynchronize(cuda_stream), "computing"));
  if (result.array_faults > 0) return internal::DescribeArrayFault(options, inputs, cuda_stream);
  outputs->sums.label_loss_sum = result.label_loss_sum;
  outputs->sums.teacher_loss_sum = result.teacher_loss_sum;
  outputs->sums.weight_sum = result.counted_weight;
  outputs->sums.counted_rows = result.counted_rows;
  outputs->sums.correct = result.correct;
  outputs->finite = result.not_finite == 0;
  if (result.fault_row < 0) return absl::OkStatus();
  return internal::DescribeRowFault(options, inputs, result, cuda_stream);
}

}  // namespace codistill
