// What surrounds the loss kernels: a block that adds up weights, and one that adds up rows, in a
// fixed order.

#include <cfloat>

#include "cuda/loss_kernels_cuda.h"
#include "cuda/loss_rows-inl.h"

namespace codistill::internal {
namespace {

constexpr int kSumThreads = 1024;

__global__ void __launch_bounds__(kSumThreads)
    PrepareLossKernel(const __grid_constant__ LossParams params) {
  CODISTILL_SHARED(double[32], storage);
  bool wrong = false;
  double weights = 0, prior = 0;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    if (params.row_weights != nullptr) {
      const float weight = params.row_weights[row];
      wrong = wrong || !(weight >= 0 && isfinite(weight));
    }
    weights += RowWeight(params, row);
  }
  if (params.prior != nullptr) {
    for (int c = static_cast<int>(threadIdx.x); c < params.classes;
         c += static_cast<int>(blockDim.x)) {
      const float value = params.prior[c];
      wrong = wrong || !(value >= 0 && isfinite(value));
      prior += value;
    }
  }
  weights = BlockSum(weights, storage);
  prior = BlockSum(prior, storage);
  if (params.prior != nullptr && !(fabs(prior - 1) <= kCudaPriorTolerance)) wrong = true;
  wrong = __syncthreads_or(wrong) != 0;
  if (threadIdx.x == 0) {
    params.result->weight_sum = weights;
    params.result->prior_scale = static_cast<float>(1 / prior);
    params.result->array_fault = wrong ? 1 : 0;
  }
}

// Of the block's, the least.
__device__ __forceinline__ int64_t BlockMin(int64_t value, double* storage) {
  auto* const places = reinterpret_cast<int64_t*>(storage);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, value, offset);
    value = other < value ? other : value;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) places[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    value = places[warp] < value ? places[warp] : value;
  }
  return value;
}

__global__ void __launch_bounds__(kSumThreads)
    SumLossKernel(const __grid_constant__ LossParams params) {
  CODISTILL_SHARED(double[32], storage);
  double label_loss = 0, teacher_loss = 0, weights = 0;
  // Exact in double up to 2^53.
  double counted = 0, correct = 0, array_faults = 0, not_finite = 0;
  int64_t fault_row = INT64_MAX;
  for (int64_t row = threadIdx.x; row < params.rows; row += blockDim.x) {
    const RowPart* const parts = params.row_parts + row * params.parts;
    array_faults += parts[0].array_fault;
    const double weight = parts[0].weight;
    if (!(weight > 0)) continue;
    double phi = 0, psi = 0;
    bool fault = false;
    for (int part = 0; part < params.parts; ++part) {
      phi += parts[part].label_loss;
      psi += parts[part].teacher_loss;
      fault = fault || parts[part].teacher_fault != 0;
    }
    label_loss += weight * phi;
    teacher_loss += weight * psi;
    weights += weight;
    counted += 1;
    correct += parts[0].correct;
    const bool finite = isfinite(phi) && isfinite(psi);
    not_finite += finite ? 0 : 1;
    if ((fault || !finite) && row < fault_row) fault_row = row;
  }
  label_loss = BlockSum(label_loss, storage);
  teacher_loss = BlockSum(teacher_loss, storage);
  weights = BlockSum(weights, storage);
  counted = BlockSum(counted, storage);
  correct = BlockSum(correct, storage);
  array_faults = BlockSum(array_faults, storage);
  not_finite = BlockSum(not_finite, storage);
  fault_row = BlockMin(fault_row, storage);
  if (threadIdx.x != 0) return;
  LossResult& result = *params.result;
  result.label_loss_sum = label_loss;
  result.teacher_loss_sum = teacher_loss;
  result.counted_weight = weights;
  result.counted_rows = static_cast<int64_t>(counted);
  result.correct = static_cast<int64_t>(correct);
  result.array_faults =
      static_cast<int64_t>(array_faults) + (params.prepared ? result.array_fault : 0);
  result.not_finite = static_cast<int64_t>(not_finite);
  result.fault_row = fault_row == INT64_MAX ? -1 : fault_row;
  result.fault_finite = 1;
  result.bad_class = -1;
  if (result.fault_row < 0) return;
  double loss = 0;
  const RowPart* const parts = params.row_parts + fault_row * params.parts;
  for (int part = 0; part < params.parts; ++part) {
    loss += parts[part].label_loss + parts[part].teacher_loss;
    if (parts[part].bad_class >= 0 && result.bad_class < 0) {
      result.bad_class = parts[part].bad_class;
      result.bad_logit = parts[part].bad_logit;
    }
  }
  result.fault_finite = isfinite(loss) ? 1 : 0;
}

}  // namespace

namespace {

// Whole warps, a thread for each of `n`.
unsigned ThreadsFor(int64_t n) {
  return static_cast<unsigned>(n >= kSumThreads ? kSumThreads : (n + 31) / 32 * 32);
}

}  // namespace

cudaError_t LaunchPrepare(const LossParams& params, cudaStream_t stream) {
  const int64_t classes = params.prior == nullptr ? 0 : params.classes;
  return LaunchKernel(&PrepareLossKernel, 1,
                      ThreadsFor(params.rows > classes ? params.rows : classes), 0, stream, params);
}

cudaError_t LaunchSums(const LossParams& params, cudaStream_t stream) {
  return LaunchKernel(&SumLossKernel, 1, ThreadsFor(params.rows), 0, stream, params);
}

}  // namespace codistill::internal
