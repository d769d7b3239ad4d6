// The k largest of every row on CUDA devices: one block a row, as on the CPU by a bound.
//
// The first walk over a row takes the largest logit of every group of elements, of which there are
// at least k. The k-th largest of those is a bound: at least k logits reach it, and few more do.
// The second walk, mostly from the cache, collects those as candidates and sums the exponentials of
// all others. The candidates are sorted; the first k are the answer. Where more candidates reach
// the bound than there is room for - many equal logits, as a model that starts from zeros gives,
// or large ones crowded into few groups - the k-th largest is searched for bit by bit, and of those
// equal to it the first are taken. Sums are in a fixed order, so results repeat bit for bit.

#include "cuda/device.h"
// device.h must come first.
#include <cfloat>
#include <cstdint>

#include "cuda/kernel_report.h"
#include "cuda/number_bits.h"
#include "cuda/row_topk_cuda.h"

namespace codistill {
namespace {

constexpr char kName[] = "row top-k";
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;         // vectors of four floats under way
constexpr int kCandidates = 4096;  // room for them: 32 KiB
constexpr int64_t kFewest = 256;   // k for which a group a thread is enough
constexpr int64_t kMaxClasses = int64_t{1} << 30;
using SortKey = unsigned long long;  // NOLINT(runtime/int): CUDA's atomics want it

struct Params {
  const float* logits;
  int64_t rows;
  int classes, k;
  float inverse_t;
  int32_t* index;
  void* value;
  NumberFormat value_format;
  float* tail;
  Lowest* not_finite_row;
};

// Larger for larger numbers; -0 counts as +0. More than 0 for every finite number.
__device__ __forceinline__ uint32_t OrderOf(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float OfOrder(uint32_t order) {
  return __uint_as_float(order ^ ((order >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// Ascending keys are descending logits, and of equal ones ascending classes.
__device__ __forceinline__ SortKey KeyOf(uint32_t order, int index) {
  return static_cast<SortKey>(~order) << 32 | static_cast<uint32_t>(index);
}
__device__ __forceinline__ uint32_t OrderOfKey(SortKey key) {
  return ~static_cast<uint32_t>(key >> 32);
}

// Calls each(x, index, u) for all elements of a row, each by one thread; u, a constant where it is
// inlined, says which of kAtOnce vectors of the thread it is in. Neighbours have neighbouring
// vectors.
template <typename Each>
__device__ __forceinline__ void Walk(const float* row, int n, const Each& each) {
  const int thread = static_cast<int>(threadIdx.x);
  // Up to three floats until an address that is a multiple of 16 bytes.
  const int to_boundary = static_cast<int>(-(reinterpret_cast<uintptr_t>(row) / 4) & 3);
  const int head = to_boundary < n ? to_boundary : n;
  const int vectors = (n - head) / 4;
  const auto* const body = reinterpret_cast<const float4*>(row + head);
  for (int v = thread; v < vectors; v += kAtOnce * kThreads) {
    float4 x[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (v + u * kThreads < vectors) x[u] = __ldg(body + v + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (v + u * kThreads >= vectors) continue;
      const int index = head + 4 * (v + u * kThreads);
      each(x[u].x, index, u);
      each(x[u].y, index + 1, u);
      each(x[u].z, index + 2, u);
      each(x[u].w, index + 3, u);
    }
  }
  if (thread < head) each(__ldg(row + thread), thread, 0);
  const int last = head + 4 * vectors + thread;
  if (last < n) each(__ldg(row + last), last, 0);
}

// Over the block; every thread gets the result. `storage` has kWarps elements, which no thread may
// still read.
__device__ __forceinline__ int BlockSum(int value, int* storage) {
  value = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(value)));
  if (threadIdx.x % 32 == 0) storage[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned part = lane < kWarps ? static_cast<unsigned>(storage[lane]) : 0u;
  return static_cast<int>(__reduce_add_sync(0xffffffffu, part));
}

__device__ __forceinline__ uint32_t BlockMax(uint32_t value, int* storage) {
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) storage[threadIdx.x / 32] = static_cast<int>(value);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return __reduce_max_sync(0xffffffffu, lane < kWarps ? static_cast<uint32_t>(storage[lane]) : 0u);
}

__device__ __forceinline__ double BlockSum(double value, double* storage) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) storage[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += storage[i];
  return sum;
}

// The largest number that count(number) says at least k reach, or a smaller one that exactly k
// reach. count(number, storage) is the block's sum of what its threads count; storage alternates,
// so that one barrier a bit is enough.
template <typename Count>
__device__ __forceinline__ uint32_t KthLargest(int k, int (*storage)[kWarps], const Count& count) {
  uint32_t bound = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = bound | 1u << bit;
    const int reach = BlockSum(count(higher), storage[bit & 1]);
    if (reach >= k) bound = higher;
    if (reach == k) break;
  }
  return bound;
}

// In place, ascending; n is a power of two.
__device__ __forceinline__ void Sort(SortKey* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
        const int low = 2 * i - (i & (distance - 1));
        const int high = low + distance;
        const bool ascending = (low & size) == 0;
        const SortKey a = keys[low], b = keys[high];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void StoreValue(const Params& params, int64_t at, float value) {
  switch (params.value_format) {
    case NumberFormat::kFloat16:
      static_cast<uint16_t*>(params.value)[at] = static_cast<uint16_t>(Float16Bits(value));
      return;
    case NumberFormat::kBfloat16:
      static_cast<uint16_t*>(params.value)[at] = static_cast<uint16_t>(Bfloat16Bits(value));
      return;
    default:
      static_cast<float*>(params.value)[at] = value;
      return;
  }
}

// What the block shares.
struct Shared {
  SortKey keys[kCandidates];
  double sums[kWarps];
  int counts[2][kWarps];
  int others[kWarps];
  int maxima[kWarps];
  int num_keys;
};

// A row whose candidates have no room: leaves the k best in shared.keys, unsorted, and returns this
// thread's part of the sum of the others' exponentials. At least k logits reach `bound`; `above` of
// them, as the whole block knows, are larger.
__device__ double Search(const Params& params, const float* row, float largest, uint32_t bound,
                         int above, Shared* shared) {
  const int thread = static_cast<int>(threadIdx.x), k = params.k;
  if (above >= k) {
    bound = KthLargest(k, shared->counts, [&](uint32_t number) {
      int reach = 0;
      Walk(row, params.classes, [&](float x, int, int) { reach += OrderOf(x) >= number ? 1 : 0; });
      return reach;
    });
  }
  __syncthreads();  // all have read shared.num_keys and shared.counts
  if (thread == 0) shared->num_keys = 0;
  __syncthreads();
  // Fewer than k are larger than the k-th largest, unless exactly k reach the bound.
  double rest = 0;
  int mine = 0;
  Walk(row, params.classes, [&](float x, int index, int) {
    const uint32_t order = OrderOf(x);
    if (order > bound) {
      const int at = atomicAdd(&shared->num_keys, 1);
      if (at < kCandidates) shared->keys[at] = KeyOf(order, index);
    } else if (order < bound) {
      rest += expf((x - largest) * params.inverse_t);
    } else {
      ++mine;
    }
  });
  const int equal = BlockSum(mine, shared->others);
  __syncthreads();
  const int larger = shared->num_keys;
  const int wanted = k - larger;
  // Those equal to it, in order of their classes, until there are enough.
  for (int begin = 0, taken = 0; taken < wanted && begin < params.classes; begin += kThreads) {
    const int index = begin + thread;
    const bool is_equal = index < params.classes && OrderOf(__ldg(row + index)) == bound;
    const unsigned votes = __ballot_sync(0xffffffffu, is_equal);
    __syncthreads();  // of the round before all have read
    if (thread % 32 == 0) shared->others[thread / 32] = __popc(votes);
    __syncthreads();
    int before = taken, all = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      if (warp < thread / 32) before += shared->others[warp];
      all += shared->others[warp];
    }
    before += __popc(votes & ((1u << thread % 32) - 1));
    if (is_equal && before < wanted) shared->keys[larger + before] = KeyOf(bound, index);
    taken += all;
  }
  if (thread == 0) {
    rest +=
        static_cast<double>(equal - wanted) * expf((OfOrder(bound) - largest) * params.inverse_t);
  }
  return rest;
}

__global__ void __launch_bounds__(kThreads, 2) TopKKernel(const Params params) {
  CODISTILL_SHARED(Shared, shared);
  const int thread = static_cast<int>(threadIdx.x), k = params.k;
  const int64_t row_number = blockIdx.x;
  const float* const row = params.logits + row_number * params.classes;

  // The first walk.
  uint32_t maxima[kAtOnce];
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) maxima[u] = 0;
  bool finite = true;
  Walk(row, params.classes, [&](float x, int, int u) {
    finite = finite && fabsf(x) <= FLT_MAX;
    const uint32_t order = OrderOf(x);
    maxima[u] = maxima[u] > order ? maxima[u] : order;
  });
  if (__syncthreads_or(finite ? 0 : 1)) {
    if (thread == 0) atomicMin(params.not_finite_row, static_cast<Lowest>(row_number));
    return;
  }
  uint32_t most = 0;
#pragma unroll
  for (int u = 0; u < kAtOnce; ++u) most = most > maxima[u] ? most : maxima[u];
  const float largest = OfOrder(BlockMax(most, shared.maxima));
  if (thread == 0) shared.num_keys = 0;
  uint32_t bound;
  if (k <= kFewest) {
    bound = KthLargest(k, shared.counts, [&](uint32_t number) { return most >= number ? 1 : 0; });
  } else {
    bound = KthLargest(k, shared.counts, [&](uint32_t number) {
      int reach = 0;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) reach += maxima[u] >= number ? 1 : 0;
      return reach;
    });
  }

  // The second.
  double rest = 0;
  float sum = 0;
  int summed = -1, above = 0;
  Walk(row, params.classes, [&](float x, int index, int u) {
    const uint32_t order = OrderOf(x);
    if (order >= bound) {
      above += order > bound ? 1 : 0;
      const int at = atomicAdd(&shared.num_keys, 1);
      if (at < kCandidates) shared.keys[at] = KeyOf(order, index);
      return;
    }
    // A few in single precision, then on to the sum in double.
    if (u != summed) {
      rest += sum;
      sum = 0;
      summed = u;
    }
    sum += expf((x - largest) * params.inverse_t);
  });
  rest += sum;
  above = BlockSum(above, shared.others);  // and all candidates are there
  int keys = shared.num_keys;
  if (keys > kCandidates) {
    rest = Search(params, row, largest, bound, above, &shared);
    keys = k;
  }
  int room = 1;
  while (room < keys) room *= 2;
  for (int i = keys + thread; i < room; i += kThreads) shared.keys[i] = ~SortKey{0};
  Sort(shared.keys, room);

  auto exponential = [&](int i) {
    return expf((OfOrder(OrderOfKey(shared.keys[i])) - largest) * params.inverse_t);
  };
  double chosen = 0;
  for (int i = thread; i < keys; i += kThreads) (i < k ? chosen : rest) += exponential(i);
  chosen = BlockSum(chosen, shared.sums);
  __syncthreads();
  rest = BlockSum(rest, shared.sums);
  const double total = chosen + rest;
  const float inverse = static_cast<float>(1 / total);
  for (int i = thread; i < k; i += kThreads) {
    const int64_t at = row_number * k + i;
    if (params.index != nullptr) {
      params.index[at] = static_cast<int32_t>(shared.keys[i] & 0xffffffffu);
    }
    if (params.value != nullptr) StoreValue(params, at, exponential(i) * inverse);
  }
  if (thread == 0 && params.tail != nullptr) {
    params.tail[row_number] = static_cast<float>(rest / total);
  }
}

}  // namespace

absl::Status LaunchRowTopK(const RowTopKInputs& inputs, const RowTopKOutputs& outputs,
                           void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateRowTopK(inputs, outputs));
  if (inputs.k > kMaxCudaTopK) {
    return absl::InvalidArgumentError(
        absl::StrCat("row top-k: k is ", inputs.k, "; at most ", kMaxCudaTopK, " on CUDA"));
  }
  if (inputs.classes > kMaxClasses) {
    return absl::InvalidArgumentError(absl::StrCat("row top-k: classes is ", inputs.classes,
                                                   "; at most ", kMaxClasses, " on CUDA"));
  }
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kName, "rows", inputs.rows));
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  CODISTILL_RETURN_IF_ERROR(ClearLowest(kName, workspace, 1, cuda_stream));
  if (inputs.rows == 0) return absl::OkStatus();
  Params params = {};
  params.logits = inputs.logits;
  params.rows = inputs.rows;
  params.classes = static_cast<int>(inputs.classes);
  params.k = static_cast<int>(inputs.k);
  params.inverse_t = static_cast<float>(1 / inputs.temperature);
  params.index = outputs.index;
  params.value = outputs.value;
  params.value_format = outputs.value_format;
  params.tail = outputs.tail;
  params.not_finite_row = static_cast<Lowest*>(workspace);
  return CudaStatus(kName, "launching the kernel",
                    LaunchKernel(&TopKKernel, dim3(static_cast<unsigned>(inputs.rows)),
                                 dim3(kThreads), 0, cuda_stream, params));
}

absl::Status FinishRowTopK(const void* workspace, void* stream, int64_t* not_finite_row) {
  if (not_finite_row != nullptr) *not_finite_row = -1;
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  int64_t bad = -1;
  CODISTILL_RETURN_IF_ERROR(
      FetchReport(kName, workspace, sizeof(bad), &bad, static_cast<cudaStream_t>(stream)));
  if (bad < 0) return absl::OkStatus();
  if (not_finite_row != nullptr) *not_finite_row = bad;
  return TopKRowNotFinite(bad);
}

}  // namespace codistill
