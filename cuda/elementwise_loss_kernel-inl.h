// Sigmoid cross-entropy and squared error, each class for itself: one read, one write. A warp a row
// where rows are short, else a block. For .cu files.

#ifndef CODISTILL_CUDA_ELEMENTWISE_LOSS_KERNEL_INL_H_
#define CODISTILL_CUDA_ELEMENTWISE_LOSS_KERNEL_INL_H_

#include <cfloat>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/loss_params.h"
#include "cuda/loss_rows-inl.h"

namespace codistill::internal {

constexpr int kElementwiseThreads = 256;

// The two probabilities of a binary decision with logit x, and their logarithms.
struct Binary {
  float yes, no, log_yes, log_no;

  __device__ __forceinline__ static Binary Of(float x) {
    const float e = expf(-fabsf(x));
    const float log_rest = log1pf(e), larger = 1 / (1 + e), smaller = e / (1 + e);
    const bool positive = x >= 0;
    return {positive ? larger : smaller, positive ? smaller : larger, fminf(x, 0) - log_rest,
            -fmaxf(x, 0) - log_rest};
  }
  __device__ __forceinline__ static Binary OfProbability(float q) {
    const float least = 1.17549435e-38f;
    return {q, 1 - q, logf(fmaxf(q, least)), logf(fmaxf(1 - q, least))};
  }
};

__device__ __forceinline__ float LogSum(float a, float b) {
  const float larger = fmaxf(fmaxf(a, b), -FLT_MAX);
  return larger + log1pf(expf(fminf(a, b) - larger));
}

// What the average of the teachers of a row says of element i.
__device__ __forceinline__ Binary AverageTeacher(const LossParams& params, int64_t row, int i) {
  const int64_t at = row * params.classes + i;
  Binary average = {};
  float mean = 0;
#pragma unroll 1
  for (int k = 0; k < params.num_dense; ++k) {
    const DenseParams& dense = params.dense[k];
    float x;
    switch (dense.format) {
      case NumberFormat::kFloat32:
        x = Number<NumberFormat::kFloat32>::One(dense.values + 4 * at);
        break;
      case NumberFormat::kBfloat16:
        x = Number<NumberFormat::kBfloat16>::One(dense.values + 2 * at);
        break;
      case NumberFormat::kFloat16:
        x = Number<NumberFormat::kFloat16>::One(dense.values + 2 * at);
        break;
      default:
        x = Number<NumberFormat::kInt8>::One(dense.values + at) * dense.scale[row];
    }
    if (params.average_logits) {
      mean += x;
      continue;
    }
    const Binary one =
        dense.probabilities ? Binary::OfProbability(x) : Binary::Of(x * params.inverse_t);
    if (k == 0) {
      average = one;
    } else {
      average = {average.yes + one.yes, average.no + one.no, LogSum(average.log_yes, one.log_yes),
                 LogSum(average.log_no, one.log_no)};
    }
  }
  const float count = static_cast<float>(params.num_dense);
  if (params.average_logits) return Binary::Of(mean / count * params.inverse_t);
  if (params.num_dense == 1) return average;
  const float log_count = logf(count);
  return {average.yes / count, average.no / count, average.log_yes - log_count,
          average.log_no - log_count};
}

// `group` threads a row: 32 or the block.
template <NumberFormat kLogits>
__global__ void __launch_bounds__(kElementwiseThreads, 2)
    ElementwiseLossKernel(const __grid_constant__ LossParams params, int group) {
  constexpr int kBytes = Number<kLogits>::kBytes;
  CODISTILL_SHARED(double[32], storage);
  CODISTILL_SHARED(unsigned long long[32], bad_storage);  // NOLINT(runtime/int): CUDA's
  const int thread = static_cast<int>(threadIdx.x) % group;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / group;
  if (row >= params.rows) return;  // whole groups
  const int classes = params.classes;
  const Part part(row, classes, 0, classes);
  const int64_t offset = row * classes;
  const Numbers<kLogits> z(params.logits + offset * kBytes, part);
  const Numbers<NumberFormat::kFloat32> targets(
      reinterpret_cast<const unsigned char*>(params.targets + offset), part);
  const GradientPart<kLogits> gradient(params.gradient + offset * kBytes, part);
  const bool write = params.gradient != nullptr;
  const float weight = RowWeight(params, row);
  RowPart result = {};
  result.bad_class = -1;
  if (!(weight > 0)) {
    if (write) {
      part.template Walk<1>(thread, group, [&](auto piece, int i, int step) {
        const float zero[decltype(piece)::chunks][decltype(piece)::width] = {};
        gradient.Store(piece, i, step, zero);
      });
    }
    if (thread == 0) params.row_parts[row] = result;
    return;
  }
  result.weight = weight;

  const float scale = RowScale(params, weight) / static_cast<float>(classes);
  const float psi_scale = scale * params.weight;
  const float temperature = params.temperature;
  float phi = 0, psi = 0;
  int wrong = 0, fault = 0;
  unsigned long long bad = kNoBadLogit;  // NOLINT(runtime/int): CUDA's
  part.template Walk<2>(thread, group, [&](auto piece, int i, int step) {
    constexpr int kChunks = decltype(piece)::chunks, kWidth = decltype(piece)::width;
    float x[kChunks][kWidth], y[kChunks][kWidth], slope[kChunks][kWidth];
    z.Load(piece, i, step, x);
    targets.Load(piece, i, step, y);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int c = i + u * step + j;
        const float value = x[u][j], target = y[u][j];
        float g;
        if (params.sigmoid) {
          const Binary p = Binary::Of(value);
          const float smooth = (1 - params.smoothing) * target + params.smoothing / 2;
          phi -= smooth * fmaxf(p.log_yes, -FLT_MAX) + (1 - smooth) * fmaxf(p.log_no, -FLT_MAX);
          g = scale * (p.yes - smooth);
          if ((value > 0) != (target > 0.5f)) wrong = 1;
        } else {
          const float difference = value - target;
          phi = fmaf(difference, difference, phi);
          g = scale * difference;
        }
        if (params.psi == Psi::kSquared) {
          float mean = 0;
          for (int k = 0; k < params.num_dense; ++k) {
            const DenseParams& dense = params.dense[k];
            AnyNumbers numbers;
            numbers.at = dense.values + offset * AnyNumbers::BytesOfNumber(dense.format);
            numbers.format = dense.format;
            numbers.aligned = false;
            numbers.scale = dense.scale == nullptr ? 1 : dense.scale[row];
            float one[1][1];
            numbers.Load(Piece<1, 1>(), c, 0, one);
            mean += one[0][0];
          }
          const float difference = value - mean / static_cast<float>(params.num_dense);
          psi = fmaf(difference, difference, psi);
          g += psi_scale * difference;
        } else if (params.psi != Psi::kNone) {
          for (int k = 0; k < params.num_dense; ++k) {
            const DenseParams& dense = params.dense[k];
            if (!dense.probabilities) continue;
            AnyNumbers numbers;
            numbers.at = dense.values + offset * AnyNumbers::BytesOfNumber(dense.format);
            numbers.format = dense.format;
            numbers.aligned = false;
            numbers.scale = 1;
            float one[1][1];
            numbers.Load(Piece<1, 1>(), c, 0, one);
            if (one[0][0] < 0 || one[0][0] > 1) fault = 1;
          }
          const Binary p = Binary::Of(value * params.inverse_t);
          const Binary q = AverageTeacher(params, row, c);
          const float yes = fmaxf(p.log_yes, -FLT_MAX), no = fmaxf(p.log_no, -FLT_MAX);
          const float log_q = fmaxf(q.log_yes, -FLT_MAX), log_not_q = fmaxf(q.log_no, -FLT_MAX);
          if (params.psi == Psi::kMatch) {
            psi += params.divergence ? q.yes * (log_q - yes) + q.no * (log_not_q - no)
                                     : -q.yes * yes - q.no * no;
            g += psi_scale * (p.yes - q.yes);
          } else {
            psi += p.yes * (yes - log_q) + p.no * (no - log_not_q) + 0 * q.yes;
            g += psi_scale * p.yes * p.no * ((yes - log_q) - (no - log_not_q));
          }
        }
        slope[u][j] = g;
        if (!isfinite(value)) bad = min(bad, BadLogit(c, value));
      }
    }
    if (write) gradient.Store(piece, i, step, slope);
  });

  // A logarithm of 0 that counted; squares may be large.
  if (params.sigmoid && !(fabsf(phi) < kInfiniteSum)) phi = INFINITY;
  if (params.psi != Psi::kSquared && !(fabsf(psi) < kInfiniteSum)) psi = INFINITY;
  double label_loss = phi, teacher_loss = psi;
  if (group == 32) {
    label_loss = WarpSum(label_loss);
    teacher_loss = WarpSum(teacher_loss);
    wrong = __any_sync(kAllLanes, wrong);
    fault = __any_sync(kAllLanes, fault);
    bad = WarpMin(bad);
  } else {
    label_loss = BlockSum(label_loss, storage);
    teacher_loss = BlockSum(teacher_loss, storage);
    wrong = __syncthreads_or(wrong);
    fault = __syncthreads_or(fault);
    bad = WarpMin(bad);
    if (thread % 32 == 0) bad_storage[thread / 32] = bad;
    __syncthreads();
    for (int warp = 0; warp < group / 32; ++warp) bad = min(bad, bad_storage[warp]);
  }
  if (thread != 0) return;
  const double n = static_cast<double>(classes);
  result.label_loss = params.sigmoid ? label_loss / n : label_loss / (2 * n);
  result.teacher_loss = params.psi == Psi::kSquared ? teacher_loss / (2 * n)
                                                    : teacher_loss / n * temperature * temperature;
  result.correct = params.sigmoid && !wrong;
  result.teacher_fault = fault;
  if (bad != kNoBadLogit) {
    result.bad_class = static_cast<int32_t>(bad >> 32);
    result.bad_logit = __uint_as_float(static_cast<unsigned>(bad));
  }
  params.row_parts[row] = result;
}

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_ELEMENTWISE_LOSS_KERNEL_INL_H_
