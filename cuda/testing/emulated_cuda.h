// Runs CUDA kernels on the processor, so that the very source that a GPU runs is tested without
// one: what of CUDA's language and runtime our kernels use, for g++ and clang. Slow (a switch of
// stacks at every barrier and shuffle), deterministic, strict.
//
// How a kernel is written for it:
//   - The .cu file includes "cuda/device.h" and nothing of CUDA besides. nvcc compiles it as it is;
//     for the tests a file x_emulated.cc says `#include "cuda/x.cu"`, in a library that depends on
//     //cuda/testing:emulated_cuda (which defines CODISTILL_EMULATED_CUDA). The launcher and its
//     tests are then one source, too.
//   - LaunchKernel(kernel, grid, block, shared_bytes, stream, arguments...) instead of <<<>>>.
//   - CODISTILL_SHARED(float[32], partial); instead of __shared__ float partial[32], and
//     DynamicShared() for the dynamic part. Types must be trivial.
//   - What this file lacks (asm, asynchronous copies, clusters) sits behind the small functions of
//     cuda/device.h, each with a twin there.
//
// How it runs: the blocks of a launch one after another (those of a cluster together), each thread
// of a block on a stack of its own until it waits: at a barrier, or for the other lanes of its
// warp. What it finds beyond wrong results:
//   - Barriers that not all threads of a block reach, or at different lines; warp functions that
//     lanes of the mask do not call; threads that have left: the launch fails with
//     cudaErrorLaunchFailure and emulated::Problem() says which threads wait where.
//   - Shared memory that nothing wrote: it is filled with 0xff (NaN, -1) before each block.
//   - A barrier too few: emulated::SetOrder() turns the order in which threads and blocks run
//     around or shuffles it, and results must stay the same to the bit.
//   - Asynchronous copies that nobody waited for: they happen when they are waited for, no sooner.
//   - With AddressSanitizer: kernels that leave their arrays, in device or shared memory; without,
//   a
//     misaligned vector is still found by UndefinedBehaviorSanitizer.
// What it cannot find: races within a warp between two warp functions' calls, and what depends on
// the memory model. One launch at a time; not for several threads.

#ifndef CODISTILL_CUDA_TESTING_EMULATED_CUDA_H_
#define CODISTILL_CUDA_TESTING_EMULATED_CUDA_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- Types. ----

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define CODISTILL_EMULATED_VECTOR(T, name, alignment)        \
  struct alignas(alignment / 2) name##2 {                    \
    T x, y;                                                  \
  };                                                         \
  struct alignas(alignment) name##4 {                        \
    T x, y, z, w;                                            \
  };                                                         \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CODISTILL_EMULATED_VECTOR(float, float, 16)
CODISTILL_EMULATED_VECTOR(int, int, 16)
CODISTILL_EMULATED_VECTOR(unsigned, uint, 16)
CODISTILL_EMULATED_VECTOR(short, short, 8)
CODISTILL_EMULATED_VECTOR(unsigned short, ushort, 8)
CODISTILL_EMULATED_VECTOR(signed char, char, 4)
CODISTILL_EMULATED_VECTOR(unsigned char, uchar, 4)
#undef CODISTILL_EMULATED_VECTOR
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;  // NOLINT(runtime/int): CUDA's
};

// As CUDA's, held by their bits.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};

// ---- Where a thread is. ----

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace codistill::emulated {

// What a launch found wrong first; empty if nothing. Reading does not clear it.
const std::string& Problem();
void ClearProblem();

// The order in which ready threads, and blocks, run. kShuffled draws another one every time, from
// the seed.
enum class Order { kForward, kBackward, kShuffled };
void SetOrder(Order order, uint64_t seed = 1);

// The device that the runtime's functions tell of.
struct Device {
  int major = 9, minor = 0;
  int multiprocessors = 132;
  int shared_per_multiprocessor = 233472, shared_per_block = 232448;
  int l2_bytes = 50 << 20;
};
void SetDevice(const Device& device);

// The launches since ClearLaunches(), for tests of how work is spread.
struct LaunchShape {
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
};
const std::vector<LaunchShape>& Launches();
void ClearLaunches();

// Runs `body` in every thread.
bool Run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes,
         const std::function<void()>& body);

// ---- For the functions below. ----

struct Place {
  const char* file;
  int line;
};

// Waits for all threads of the block; returns how many came with `value`.
int Barrier(bool value, Place place);
// Waits for the lanes in `mask`, who all bring a value; returns that of lane `from`. The votes and
// reductions are made of all values: `combine` gets them and the mask.
uint64_t Shuffle(unsigned mask, uint64_t value, int from, Place place);
uint64_t Combine(unsigned mask, uint64_t value, uint64_t (*combine)(const uint64_t*, unsigned),
                 Place place);
int Lane();

void* StaticShared(const void* key, size_t bytes);
unsigned char* DynamicShared();

// Clusters.
unsigned ClusterRank();
unsigned ClusterSize();
void ClusterArrive();
void ClusterWait(Place place);
// The place in the shared memory of block `rank` of the cluster that `local` has in this block's.
void* MapShared(void* local, unsigned rank);

// Asynchronous copies.
void AsyncCopy(void* to, const void* from, size_t bytes);
void AsyncCommit();
void AsyncWait(int groups_left);

template <typename To, typename From>
To Bits(const From& from) {
  static_assert(sizeof(To) >= sizeof(From));
  To to{};
  memcpy(&to, &from, sizeof(From));
  return to;
}
template <typename To>
To FromBits(uint64_t from) {
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace codistill::emulated

#define CODISTILL_EMULATED_HERE \
  codistill::emulated::Place { file, line }
#define CODISTILL_EMULATED_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- Barriers and warps. ----

inline void __syncthreads(CODISTILL_EMULATED_PLACE) {
  codistill::emulated::Barrier(false, CODISTILL_EMULATED_HERE);
}
inline int __syncthreads_count(int value, CODISTILL_EMULATED_PLACE) {
  return codistill::emulated::Barrier(value != 0, CODISTILL_EMULATED_HERE);
}
inline int __syncthreads_or(int value, CODISTILL_EMULATED_PLACE) {
  return codistill::emulated::Barrier(value != 0, CODISTILL_EMULATED_HERE) > 0;
}
inline int __syncthreads_and(int value, CODISTILL_EMULATED_PLACE) {
  return codistill::emulated::Barrier(value == 0, CODISTILL_EMULATED_HERE) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CODISTILL_EMULATED_PLACE) {
  codistill::emulated::Shuffle(mask, 0, codistill::emulated::Lane(), CODISTILL_EMULATED_HERE);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CODISTILL_EMULATED_PLACE) {
  const int first = codistill::emulated::Lane() & ~(width - 1);
  return codistill::emulated::FromBits<T>(
      codistill::emulated::Shuffle(mask, codistill::emulated::Bits<uint64_t>(value),
                                   first + (from & (width - 1)), CODISTILL_EMULATED_HERE));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, CODISTILL_EMULATED_PLACE) {
  const int lane = codistill::emulated::Lane();
  const int from = (lane ^ flip) < (lane & ~(width - 1)) + width ? lane ^ flip : lane;
  return codistill::emulated::FromBits<T>(codistill::emulated::Shuffle(
      mask, codistill::emulated::Bits<uint64_t>(value), from, CODISTILL_EMULATED_HERE));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CODISTILL_EMULATED_PLACE) {
  const int lane = codistill::emulated::Lane();
  const int from = (lane & (width - 1)) + static_cast<int>(by);
  return codistill::emulated::FromBits<T>(codistill::emulated::Shuffle(
      mask, codistill::emulated::Bits<uint64_t>(value),
      from < width ? lane + static_cast<int>(by) : lane, CODISTILL_EMULATED_HERE));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CODISTILL_EMULATED_PLACE) {
  const int lane = codistill::emulated::Lane();
  const int from = (lane & (width - 1)) - static_cast<int>(by);
  return codistill::emulated::FromBits<T>(codistill::emulated::Shuffle(
      mask, codistill::emulated::Bits<uint64_t>(value),
      from >= 0 ? lane - static_cast<int>(by) : lane, CODISTILL_EMULATED_HERE));
}
inline unsigned __ballot_sync(unsigned mask, int value, CODISTILL_EMULATED_PLACE) {
  return static_cast<unsigned>(codistill::emulated::Combine(
      mask, value != 0,
      [](const uint64_t* values, unsigned lanes) {
        uint64_t bits = 0;
        for (int i = 0; i < 32; ++i) {
          if ((lanes >> i & 1) != 0 && values[i] != 0) bits |= uint64_t{1} << i;
        }
        return bits;
      },
      CODISTILL_EMULATED_HERE));
}
inline int __any_sync(unsigned mask, int value, CODISTILL_EMULATED_PLACE) {
  return __ballot_sync(mask, value, file, line) != 0;
}
inline int __all_sync(unsigned mask, int value, CODISTILL_EMULATED_PLACE) {
  return __ballot_sync(mask, value, file, line) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CODISTILL_EMULATED_PLACE) {
  // Every lane shows its value in turn; all stay together.
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0 && __shfl_sync(mask, value, i, 32, file, line) == value) {
      same |= 1u << i;
    }
  }
  return same;
}

#define CODISTILL_EMULATED_REDUCTION(name, expression)                           \
  template <typename T>                                                          \
  T __reduce_##name##_sync(unsigned mask, T value, CODISTILL_EMULATED_PLACE) {   \
    static_assert(sizeof(T) == 4, "32-bit integers only");                       \
    return codistill::emulated::FromBits<T>(codistill::emulated::Combine(        \
        mask, codistill::emulated::Bits<uint64_t>(value),                        \
        [](const uint64_t* values, unsigned lanes) {                             \
          bool first = true;                                                     \
          T result{};                                                            \
          for (int i = 0; i < 32; ++i) {                                         \
            if ((lanes >> i & 1) == 0) continue;                                 \
            const T a = result, b = codistill::emulated::FromBits<T>(values[i]); \
            result = first ? b : static_cast<T>(expression);                     \
            first = false;                                                       \
          }                                                                      \
          return codistill::emulated::Bits<uint64_t>(result);                    \
        },                                                                       \
        CODISTILL_EMULATED_HERE));                                               \
  }
CODISTILL_EMULATED_REDUCTION(add, a + b)
CODISTILL_EMULATED_REDUCTION(min, a < b ? a : b)
CODISTILL_EMULATED_REDUCTION(max, a < b ? b : a)
CODISTILL_EMULATED_REDUCTION(or, a | b)
CODISTILL_EMULATED_REDUCTION(and, a& b)
CODISTILL_EMULATED_REDUCTION(xor, a ^ b)
#undef CODISTILL_EMULATED_REDUCTION

#undef CODISTILL_EMULATED_PLACE
#undef CODISTILL_EMULATED_HERE

// ---- Atomics: threads never run at the same time. ----

#define CODISTILL_EMULATED_ATOMIC(name, expression)    \
  template <typename T, typename U>                    \
  T atomic##name(T* address, U operand) {              \
    const T a = *address, b = static_cast<T>(operand); \
    *address = static_cast<T>(expression);             \
    return a;                                          \
  }
CODISTILL_EMULATED_ATOMIC(Add, a + b)
CODISTILL_EMULATED_ATOMIC(Sub, a - b)
CODISTILL_EMULATED_ATOMIC(Min, a < b ? a : b)
CODISTILL_EMULATED_ATOMIC(Max, a < b ? b : a)
CODISTILL_EMULATED_ATOMIC(Or, a | b)
CODISTILL_EMULATED_ATOMIC(And, a& b)
CODISTILL_EMULATED_ATOMIC(Exch, ((void)a, b))
#undef CODISTILL_EMULATED_ATOMIC
template <typename T, typename U, typename V>
T atomicCAS(T* address, U expected, V desired) {
  const T old = *address;
  if (old == static_cast<T>(expected)) *address = static_cast<T>(desired);
  return old;
}

// ---- Arithmetic. ----

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __float_as_uint(float x) { return codistill::emulated::Bits<unsigned>(x); }
inline int __float_as_int(float x) { return codistill::emulated::Bits<int>(x); }
inline float __uint_as_float(unsigned x) { return codistill::emulated::Bits<float>(x); }
inline float __int_as_float(int x) { return codistill::emulated::Bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }  // NOLINT
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
float __half2float(__half x);
__half __float2half_rn(float x);
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

// ---- Memory. ----

#define CODISTILL_EMULATED_LOAD(name) \
  template <typename T>               \
  T name(const T* address) {          \
    return *address;                  \
  }
CODISTILL_EMULATED_LOAD(__ldg)
CODISTILL_EMULATED_LOAD(__ldcg)
CODISTILL_EMULATED_LOAD(__ldca)
CODISTILL_EMULATED_LOAD(__ldcs)
CODISTILL_EMULATED_LOAD(__ldlu)
CODISTILL_EMULATED_LOAD(__ldcv)
#undef CODISTILL_EMULATED_LOAD
#define CODISTILL_EMULATED_STORE(name)    \
  template <typename T>                   \
  void name(T* address, const T& value) { \
    *address = value;                     \
  }
CODISTILL_EMULATED_STORE(__stcg)
CODISTILL_EMULATED_STORE(__stcs)
CODISTILL_EMULATED_STORE(__stwb)
CODISTILL_EMULATED_STORE(__stwt)
#undef CODISTILL_EMULATED_STORE

template <typename T>
using CodistillSharedType = T;
#define CODISTILL_SHARED(type, name)                     \
  static const char name##_key = 0;                      \
  auto& name = *static_cast<CodistillSharedType<type>*>( \
      codistill::emulated::StaticShared(&name##_key, sizeof(CodistillSharedType<type>)))

// ---- The runtime. Memory of the device is the processor's, filled with 0xff. ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrL2CacheSize,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
using cudaStream_t = struct EmulatedCudaStream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** pointer, size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemset(void* to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();

namespace codistill::emulated {
cudaError_t SetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t ActiveBlocks(int* blocks, int threads, size_t shared_bytes);
cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& body);
}  // namespace codistill::emulated

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  return codistill::emulated::SetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...),
                                                          int threads, size_t shared_bytes) {
  return codistill::emulated::ActiveBlocks(blocks, threads, shared_bytes);
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  // Arguments are copied for every thread, as a kernel may write to its own.
  return codistill::emulated::Launch(
      *config, reinterpret_cast<const void*>(kernel),
      [kernel, arguments...] { kernel(static_cast<Parameters>(arguments)...); });
}

#endif  // CODISTILL_CUDA_TESTING_EMULATED_CUDA_H_
