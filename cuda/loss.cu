// Softmax cross-entropy with distillation on CUDA devices: one block a row.
//
// The first walk computes maxima and sums in one go (a sum is rescaled when its maximum rises);
// where the loss is not a by-product of it, a second walk sums the loss; the last writes the
// gradient. Every thread takes the same elements in each walk and sums are combined in a fixed
// order, so results repeat bit for bit, and the gradient may replace the logits.

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "cuda/loss_cuda.h"

namespace codistill {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// What the device leaves at the start of the workspace.
struct Result {
  double label_loss_sum, teacher_loss_sum;
  int64_t correct;
  int64_t bad_rows;  // labels out of range
  int64_t first_bad_row, first_bad_label;
};

// And behind it, for every row.
struct RowResult {
  double label_loss, teacher_loss;
  int64_t correct;  // -1: label out of range
};

enum class Term { kNone, kMatch, kMatchWithEntropy, kReverse, kSquared };

struct Params {
  int64_t rows, classes;
  const float* logits;
  const int64_t* labels;
  const float* teachers[kMaxCudaTeachers];
  int num_teachers;
  int num_softmaxes;  // teachers whose probabilities are averaged; 1 when their logits are
  float smoothing, inverse_t, temperature;
  float row_scale;  // of the gradient
  float weight;
  float* gradient;
  Result* result;
  RowResult* row_results;
};

// Maximum, and sums relative to it: of e = exp(x - max), and of e * w.
struct Online {
  float max = -FLT_MAX, sum = 0, moment = 0;

  __device__ void Add(float x, float w) {
    if (x > max) {
      const float shrink = expf(max - x);
      sum = sum * shrink + 1;
      moment = moment * shrink + w;
      max = x;
    } else {
      const float e = expf(x - max);
      sum += e;
      moment += e * w;
    }
  }

  __device__ void Merge(const Online& other) {
    const float larger = fmaxf(max, other.max);
    const float mine = expf(max - larger), theirs = expf(other.max - larger);
    sum = sum * mine + other.sum * theirs;
    moment = moment * mine + other.moment * theirs;
    max = larger;
  }

  __device__ float LogSumExp() const { return max + logf(sum); }
};

// The largest logit and the first class that has it.
struct Best {
  float value = -INFINITY;
  int64_t index = INT64_MAX;

  __device__ void Merge(const Best& other) {
    if (other.value > value || (other.value == value && other.index < index)) *this = other;
  }
};

struct Total {
  double value = 0;
  __device__ void Merge(const Total& other) { value += other.value; }
};

// A copy of `value` from the lane `offset` above, word by word.
template <typename T>
__device__ T ShuffleDown(const T& value, int offset) {
  static_assert(sizeof(T) % sizeof(int) == 0, "shuffled by words");
  T result;
  const int* from = reinterpret_cast<const int*>(&value);
  int* to = reinterpret_cast<int*>(&result);
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(int); ++i) {
    to[i] = __shfl_down_sync(0xffffffffu, from[i], offset);
  }
  return result;
}

// Merges over the block in a fixed order; every thread gets the result.
template <typename T>
__device__ T BlockMerge(T value) {
  alignas(16) __shared__ unsigned char storage[kWarps * sizeof(T)];
  T* const shared = reinterpret_cast<T*>(storage);
  for (int offset = 16; offset > 0; offset /= 2) value.Merge(ShuffleDown(value, offset));
  __syncthreads();  // of an earlier call all have read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) value.Merge(shared[i]);
    shared[0] = value;
  }
  __syncthreads();
  return shared[0];
}

// One row's pointers, and the teachers as the loss sees them.
struct RowView {
  const Params& params;
  int64_t offset;

  __device__ float Logit(int64_t c) const { return params.logits[offset + c]; }

  __device__ float MeanTeacher(int64_t c) const {
    float sum = 0;
    for (int k = 0; k < params.num_teachers; ++k) sum += params.teachers[k][offset + c];
    return sum / static_cast<float>(params.num_teachers);
  }

  // Logit of softmax k, at temperature 1.
  __device__ float Teacher(int k, int64_t c) const {
    if (params.num_softmaxes < params.num_teachers) return MeanTeacher(c);
    return params.teachers[k][offset + c];
  }
};

// Whether psi's gradient is the difference of probabilities.
__host__ __device__ constexpr bool Matches(Term term) {
  return term == Term::kMatch || term == Term::kMatchWithEntropy;
}
__host__ __device__ constexpr bool NeedsTeacherSoftmax(Term term) {
  return term != Term::kNone && term != Term::kSquared;
}

// kSoftmaxes is 1, or kMaxCudaTeachers for any number up to it.
template <Term kTerm, int kSoftmaxes>
__global__ void __launch_bounds__(kThreads) LossKernel(const Params params) {
  const int softmaxes = kSoftmaxes == 1 ? 1 : params.num_softmaxes;
  const int64_t row = blockIdx.x, classes = params.classes;
  const RowView view{params, row * classes};
  const int64_t label = params.labels[row];
  if (label < 0 || label >= classes) {
    if (threadIdx.x == 0) params.row_results[row] = {0, 0, -1};
    return;
  }
  const float inverse_t = params.inverse_t;
  const bool warm = NeedsTeacherSoftmax(kTerm) && params.temperature != 1;
  const float label_logit = view.Logit(label), origin = view.Logit(0);

  // Walk one. The student's moment, for smoothing, is kept apart: it has no exponential in it.
  Online student, student_t, teachers[kSoftmaxes];
  Best best;
  float plain_sum = 0;
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
    const float z = view.Logit(c);
    student.Add(z, 0);
    best.Merge({z, c});
    plain_sum += z - origin;
    if (warm) student_t.Add(z * inverse_t, 0);
    if (NeedsTeacherSoftmax(kTerm)) {
#pragma unroll 1
      for (int k = 0; k < softmaxes; ++k) {
        teachers[k].Add(view.Teacher(k, c) * inverse_t, z - origin);
      }
    }
  }
  student = BlockMerge(student);
  best = BlockMerge(best);
  const double mean_logit =
      params.smoothing > 0 ? BlockMerge(Total{plain_sum}).value / static_cast<double>(classes) : 0;
  student_t = warm ? BlockMerge(student_t) : student;
  float q_logs[kSoftmaxes];
  double mean_under_teachers = 0;
  if (NeedsTeacherSoftmax(kTerm)) {
#pragma unroll 1
    for (int k = 0; k < softmaxes; ++k) {
      const Online teacher = BlockMerge(teachers[k]);
      q_logs[k] = teacher.LogSumExp();
      mean_under_teachers += static_cast<double>(teacher.moment) / teacher.sum;
    }
    mean_under_teachers /= softmaxes;
  }
  const float p_log = student_t.LogSumExp();

  // Logarithm of the teachers' probability of a class; exact where the probability vanishes.
  auto log_q_of = [&](int64_t c) {
    if (kSoftmaxes == 1) return view.Teacher(0, c) * inverse_t - q_logs[0];
    float logs[kSoftmaxes];
    float max = -INFINITY;
#pragma unroll 1
    for (int k = 0; k < softmaxes; ++k) {
      logs[k] = view.Teacher(k, c) * inverse_t - q_logs[k];
      max = fmaxf(max, logs[k]);
    }
    float sum = 0;
#pragma unroll 1
    for (int k = 0; k < softmaxes; ++k) sum += expf(logs[k] - max);
    return max + logf(sum / static_cast<float>(softmaxes));
  };

  // Walk two, for the losses that are not sums of the first.
  double psi = 0;
  float divergence = 0;
  if (kTerm == Term::kMatch) {
    psi = static_cast<double>(student_t.max) - static_cast<double>(origin) * inverse_t +
          log(static_cast<double>(student_t.sum)) - mean_under_teachers * inverse_t;
  } else if (kTerm != Term::kNone) {
    Total total;
    for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
      const float z = view.Logit(c);
      if (kTerm == Term::kSquared) {
        const float difference = z - view.MeanTeacher(c);
        total.value += difference * difference;
      } else {
        const float log_p = z * inverse_t - p_log, log_q = log_q_of(c);
        total.value +=
            kTerm == Term::kReverse ? expf(log_p) * (log_p - log_q) : expf(log_q) * (log_q - log_p);
      }
    }
    psi = BlockMerge(total).value;
    divergence = static_cast<float>(psi);
    if (kTerm == Term::kSquared) psi /= 2 * static_cast<double>(classes);
  }

  if (threadIdx.x == 0) {
    const double at_label = static_cast<double>(label_logit) - origin;
    double phi =
        static_cast<double>(student.max) - label_logit + log(static_cast<double>(student.sum));
    if (params.smoothing > 0) phi += params.smoothing * (at_label - mean_logit);
    const double t2 = static_cast<double>(params.temperature) * params.temperature;
    params.row_results[row] = {phi, NeedsTeacherSoftmax(kTerm) ? t2 * psi : psi,
                               best.index == label};
  }
  if (params.gradient == nullptr) return;

  // The last walk.
  const float normaliser = 1 / student.sum, normaliser_t = 1 / student_t.sum;
  const float uniform = params.smoothing / static_cast<float>(classes);
  for (int64_t c = threadIdx.x; c < classes; c += kThreads) {
    const float z = view.Logit(c);
    float slope = expf(z - student.max) * normaliser - uniform;
    if (c == label) slope -= 1 - params.smoothing;
    if (Matches(kTerm)) {
      float q = 0;
#pragma unroll 1
      for (int k = 0; k < softmaxes; ++k) q += expf(view.Teacher(k, c) * inverse_t - q_logs[k]);
      const float p = expf(z * inverse_t - student_t.max) * normaliser_t;
      slope += params.weight * params.temperature * (p - q / static_cast<float>(softmaxes));
    } else if (kTerm == Term::kReverse) {
      const float log_p = z * inverse_t - p_log;
      slope +=
          params.weight * params.temperature * expf(log_p) * (log_p - log_q_of(c) - divergence);
    } else if (kTerm == Term::kSquared) {
      slope += params.weight / static_cast<float>(classes) * (z - view.MeanTeacher(c));
    }
    params.gradient[view.offset + c] = slope * params.row_scale;
  }
}

struct Sums {
  double label_loss = 0, teacher_loss = 0;
  int64_t correct = 0, bad_rows = 0, first_bad_row = INT64_MAX;

  __device__ void Merge(const Sums& other) {
    label_loss += other.label_loss;
    teacher_loss += other.teacher_loss;
    correct += other.correct;
    bad_rows += other.bad_rows;
    first_bad_row = other.first_bad_row < first_bad_row ? other.first_bad_row : first_bad_row;
  }
};

// One block sums the rows.
__global__ void __launch_bounds__(kThreads) SumKernel(const Params params) {
  Sums sums;
  for (int64_t row = threadIdx.x; row < params.rows; row += kThreads) {
    const RowResult& result = params.row_results[row];
    if (result.correct < 0) {
      sums.Merge({0, 0, 0, 1, row});
    } else {
      sums.Merge({result.label_loss, result.teacher_loss, result.correct, 0, INT64_MAX});
    }
  }
  sums = BlockMerge(sums);
  if (threadIdx.x == 0) {
    const bool bad = sums.bad_rows > 0;
    *params.result = {sums.label_loss,
                      sums.teacher_loss,
                      sums.correct,
                      sums.bad_rows,
                      bad ? sums.first_bad_row : -1,
                      bad ? params.labels[sums.first_bad_row] : 0};
  }
}

using Kernel = void (*)(Params);

template <Term kTerm>
Kernel ChooseKernel(bool one_softmax) {
  return one_softmax ? &LossKernel<kTerm, 1> : &LossKernel<kTerm, kMaxCudaTeachers>;
}

Kernel ChooseKernel(const LossOptions& options, bool teach, bool one_softmax) {
  if (!teach) return &LossKernel<Term::kNone, 1>;
  switch (options.teacher_loss) {
    case LossOptions::kSoftCrossEntropy:
      return ChooseKernel<Term::kMatch>(one_softmax);
    case LossOptions::kKlTeacherStudent:
      return ChooseKernel<Term::kMatchWithEntropy>(one_softmax);
    case LossOptions::kKlStudentTeacher:
      return ChooseKernel<Term::kReverse>(one_softmax);
    default:
      return &LossKernel<Term::kSquared, 1>;
  }
}

absl::Status CudaError(cudaError_t error, const char* action) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("loss: ", action, ": ", cudaGetErrorName(error), ": ",
                                          cudaGetErrorString(error)));
}

}  // namespace

size_t CudaLossWorkspaceBytes(int64_t rows) {
  return sizeof(Result) + static_cast<size_t>(rows) * sizeof(RowResult);
}

absl::Status LaunchLoss(const LossOptions& options, const LossInputs& inputs, void* gradient,
                        void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateLoss(options, inputs));
  if (options.label_loss != LossOptions::kSoftmaxCrossEntropy) {
    return absl::UnimplementedError(
        "loss: on CUDA only the softmax cross-entropy is available as label loss");
  }
  const bool teach = inputs.teacher_weight > 0;
  if (teach && !inputs.topk_teachers.empty()) {
    return absl::UnimplementedError(
        "loss: topk_teachers: on CUDA teachers must give all their logits");
  }
  if (teach && inputs.teachers.size() > kMaxCudaTeachers) {
    return absl::InvalidArgumentError(absl::StrCat("loss: teachers: ", inputs.teachers.size(),
                                                   " given; at most ", kMaxCudaTeachers,
                                                   " on CUDA"));
  }
  bool plain = inputs.logits_format == NumberFormat::kFloat32 && inputs.row_weights == nullptr &&
               inputs.label_prior == nullptr && !options.ignored_label.has_value();
  for (const DenseTeacher& teacher : inputs.teachers) {
    plain = plain && teacher.format == NumberFormat::kFloat32 &&
            teacher.kind == DenseTeacher::kLogits;
  }
  if (!plain) {
    return absl::UnimplementedError(
        "loss: on CUDA only float32 logits, of students and teachers, every row counting alike");
  }
  if (inputs.rows > INT32_MAX) {
    return absl::InvalidArgumentError(
        absl::StrCat("loss: rows is ", inputs.rows, "; at most ", INT32_MAX, " on CUDA"));
  }
  if (workspace == nullptr) return absl::InvalidArgumentError("loss: workspace is null");

  Params params = {};
  params.rows = inputs.rows;
  params.classes = inputs.classes;
  params.logits = static_cast<const float*>(inputs.logits);
  params.labels = inputs.labels;
  params.num_softmaxes = 1;
  if (teach) {
    params.num_teachers = static_cast<int>(inputs.teachers.size());
    for (int k = 0; k < params.num_teachers; ++k) {
      params.teachers[k] = static_cast<const float*>(inputs.teachers[k].values);
    }
    if (options.teacher_average == LossOptions::kProbabilities) {
      params.num_softmaxes = params.num_teachers;
    }
  }
  params.smoothing = options.label_smoothing;
  params.temperature = options.temperature;
  params.inverse_t = 1 / options.temperature;
  params.row_scale = static_cast<float>(inputs.gradient_scale / static_cast<double>(inputs.rows));
  params.weight = inputs.teacher_weight;
  params.gradient = static_cast<float*>(gradient);
  params.result = static_cast<Result*>(workspace);
  params.row_results = reinterpret_cast<RowResult*>(params.result + 1);

  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const unsigned blocks = static_cast<unsigned>(inputs.rows);
  const auto kernel = ChooseKernel(options, teach, params.num_softmaxes == 1);
  kernel<<<blocks, kThreads, 0, cuda_stream>>>(params);
  CODISTILL_RETURN_IF_ERROR(CudaError(cudaGetLastError(), "launching the kernel"));
  SumKernel<<<1, kThreads, 0, cuda_stream>>>(params);
  return CudaError(cudaGetLastError(), "launching the sum");
}

absl::Status FinishLoss(const LossInputs& inputs, const void* workspace, void* stream,
                        LossOutputs* outputs) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  Result result;
  CODISTILL_RETURN_IF_ERROR(CudaError(
      cudaMemcpyAsync(&result, workspace, sizeof(result), cudaMemcpyDeviceToHost, cuda_stream),
      "fetching the result"));
  CODISTILL_RETURN_IF_ERROR(CudaError(cudaStreamSynchronize(cuda_stream), "computing"));
  if (result.bad_rows > 0) {
    return absl::InvalidArgumentError(absl::StrCat("loss: labels holds ", result.first_bad_label,
                                                   " in row ", result.first_bad_row, "; want 0 to ",
                                                   inputs.classes - 1));
  }
  outputs->sums.label_loss_sum = result.label_loss_sum;
  outputs->sums.teacher_loss_sum = result.teacher_loss_sum;
  outputs->sums.correct = result.correct;
  outputs->sums.counted_rows = inputs.rows;
  outputs->sums.weight_sum = static_cast<double>(inputs.rows);
  outputs->finite = std::isfinite(result.label_loss_sum) && std::isfinite(result.teacher_loss_sum);
  if (outputs->finite) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("loss: ", std::isfinite(result.label_loss_sum) ? "teachers" : "logits",
                   " make a loss that is not finite"));
}

}  // namespace codistill
