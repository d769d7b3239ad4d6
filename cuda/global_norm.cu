// The norm over a list of tensors on CUDA devices: a block sums a chunk of one of them, and one
// block sums the chunks, everything in a fixed order. The list travels as an argument of the
// kernel, so that nothing need be copied to the device first; long lists take several launches.

#include "cuda/device.h"
// device.h must come first.
#include <algorithm>
#include <cstdint>

#include "cuda/global_norm_cuda.h"
#include "cuda/kernel_report.h"

namespace codistill {
namespace {

constexpr char kName[] = "global norm";
constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
constexpr int64_t kChunk = 16 << 10;  // 64 KiB
constexpr int kAtOnce = 4;            // vectors of four floats under way
// Arguments of a kernel have 4 KiB.
constexpr int kTensorsPerLaunch = 160;

struct Launch {
  const float* values[kTensorsPerLaunch];
  int64_t sizes[kTensorsPerLaunch];
  int first_chunk[kTensorsPerLaunch + 1];  // the launch's blocks by tensor
  int tensors;
  int64_t first_tensor;
  double* sums;  // of this launch's chunks
  Lowest* first_not_finite;
};
static_assert(sizeof(Launch) <= 4096, "fits the arguments of a kernel");

// At the start of the workspace, before the chunks' sums; laid out as GlobalNorm.
struct Result {
  double sum_of_squares;
  Lowest first_not_finite;
};
static_assert(sizeof(Result) == sizeof(GlobalNorm), "read as one");

// The sum over the block, in a fixed order; only the first thread's is right.
template <int kBlock>
__device__ double BlockSum(double value) {
  CODISTILL_SHARED(double[kBlock / 32], warps);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kBlock / 32; ++i) value += warps[i];
  }
  return value;
}

__device__ __forceinline__ bool IsFinite(double x) { return fabs(x) <= 1.7976931348623157e308; }

__global__ void __launch_bounds__(kThreads) SquaresKernel(const Launch launch) {
  // The tensor whose chunk this block has: the last that begins no later.
  const int block = static_cast<int>(blockIdx.x);
  int tensor = 0, end = launch.tensors;
  while (end - tensor > 1) {
    const int middle = (tensor + end) / 2;
    if (launch.first_chunk[middle] <= block) {
      tensor = middle;
    } else {
      end = middle;
    }
  }
  const int64_t begin = (block - launch.first_chunk[tensor]) * kChunk;
  const float* const values = launch.values[tensor] + begin;
  const int64_t left = launch.sizes[tensor] - begin;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);

  // Up to three floats until an address that is a multiple of 16 bytes.
  const int to_boundary = static_cast<int>(-(reinterpret_cast<uintptr_t>(values) / 4) & 3);
  const int head = to_boundary < n ? to_boundary : n;
  const int vectors = (n - head) / 4;
  const auto* const body = reinterpret_cast<const float4*>(values + head);
  const int thread = static_cast<int>(threadIdx.x);
  double sums[4] = {0, 0, 0, 0};
  for (int v = thread; v < vectors; v += kAtOnce * kThreads) {
    float4 x[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      x[u] = v + u * kThreads < vectors ? __ldcs(body + v + u * kThreads) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      sums[0] += static_cast<double>(x[u].x) * x[u].x;
      sums[1] += static_cast<double>(x[u].y) * x[u].y;
      sums[2] += static_cast<double>(x[u].z) * x[u].z;
      sums[3] += static_cast<double>(x[u].w) * x[u].w;
    }
  }
  const int tail = head + 4 * vectors + thread;
  if (thread < head) sums[0] += static_cast<double>(values[thread]) * values[thread];
  if (tail < n) sums[1] += static_cast<double>(values[tail]) * values[tail];
  const double sum = BlockSum<kThreads>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (thread != 0) return;
  launch.sums[block] = sum;
  // The square of a float is far from the largest double.
  if (!IsFinite(sum)) {
    atomicMin(launch.first_not_finite, static_cast<Lowest>(launch.first_tensor + tensor));
  }
}

__global__ void __launch_bounds__(kSumThreads)
    SumKernel(const double* sums, int64_t n, Result* result) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += sums[i];
  sum = BlockSum<kSumThreads>(sum);
  if (threadIdx.x == 0) result->sum_of_squares = sum;
}

int64_t Chunks(int64_t size) { return size <= 0 ? 0 : (size - 1) / kChunk + 1; }

}  // namespace

size_t GlobalNormWorkspaceBytes(absl::Span<const FloatArray> tensors) {
  int64_t chunks = 0;
  for (const FloatArray& tensor : tensors) chunks += Chunks(tensor.size);
  return sizeof(Result) + static_cast<size_t>(chunks) * sizeof(double);
}

absl::Status LaunchGlobalNorm(absl::Span<const FloatArray> tensors, void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateGlobalNorm(tensors));
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  for (const FloatArray& tensor : tensors) {
    CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kName, "tensors", Chunks(tensor.size)));
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  auto* const result = static_cast<Result*>(workspace);
  auto* const sums = reinterpret_cast<double*>(result + 1);
  CODISTILL_RETURN_IF_ERROR(ClearLowest(kName, &result->first_not_finite, 1, cuda_stream));
  int64_t chunks = 0;
  for (size_t t = 0; t < tensors.size();) {
    Launch launch = {};
    launch.first_tensor = static_cast<int64_t>(t);
    launch.sums = sums + chunks;
    launch.first_not_finite = &result->first_not_finite;
    int64_t blocks = 0;
    while (t < tensors.size() && launch.tensors < kTensorsPerLaunch &&
           blocks + Chunks(tensors[t].size) <= INT32_MAX) {
      launch.values[launch.tensors] = tensors[t].values;
      launch.sizes[launch.tensors] = tensors[t].size;
      launch.first_chunk[launch.tensors++] = static_cast<int>(blocks);
      blocks += Chunks(tensors[t++].size);
    }
    launch.first_chunk[launch.tensors] = static_cast<int>(blocks);
    chunks += blocks;
    if (blocks == 0) continue;
    CODISTILL_RETURN_IF_ERROR(
        CudaStatus(kName, "launching the kernel",
                   LaunchKernel(&SquaresKernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                0, cuda_stream, launch)));
  }
  return CudaStatus(kName, "launching the sum",
                    LaunchKernel(&SumKernel, dim3(1), dim3(kSumThreads), 0, cuda_stream,
                                 static_cast<const double*>(sums), chunks, result));
}

absl::Status FinishGlobalNorm(const void* workspace, void* stream, GlobalNorm* result) {
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  return FetchReport(kName, workspace, sizeof(*result), result, static_cast<cudaStream_t>(stream));
}

}  // namespace codistill
