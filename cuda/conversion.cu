// Conversions on CUDA devices: 16-byte accesses, 64 bytes of every thread under way.

#include "cuda/device.h"
// device.h must come first.
#include <cstdint>

#include "cuda/conversion_cuda.h"
#include "cuda/kernel_report.h"
#include "cuda/number_bits.h"

namespace codistill {
namespace {

constexpr char kName[] = "conversion";
constexpr int kThreads = 256;
constexpr int kWarp = 32;

// ---- Numbers one by one. ----

struct AsFloat16 {
  __device__ static uint32_t Of(float x) { return Float16Bits(x); }
};
struct AsBfloat16 {
  __device__ static uint32_t Of(float x) { return Bfloat16Bits(x); }
};
struct OfFloat16 {
  __device__ static float Of(uint32_t x) { return OfFloat16Bits(x); }
};
struct OfBfloat16 {
  __device__ static float Of(uint32_t x) { return OfBfloat16Bits(x); }
};

constexpr int kAtOnce = 8;   // numbers of a thread in one 16-byte vector of halves
constexpr int kVectors = 2;  // such vectors of a thread
constexpr int kPerBlock = kThreads * kAtOnce * kVectors;

template <typename To>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  return To::Of(low) | To::Of(high) << 16;
}

// Both arrays are aligned to 16 bytes.
template <typename To>
__global__ void __launch_bounds__(kThreads)
    NarrowVectors(const float* __restrict__ from, int64_t n, uint16_t* __restrict__ to) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kPerBlock;
  float4 low[kVectors], high[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = block + (v * kThreads + static_cast<int>(threadIdx.x)) * kAtOnce;
    if (i + kAtOnce > n) continue;
    low[v] = __ldcs(reinterpret_cast<const float4*>(from + i));
    high[v] = __ldcs(reinterpret_cast<const float4*>(from + i) + 1);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = block + (v * kThreads + static_cast<int>(threadIdx.x)) * kAtOnce;
    if (i + kAtOnce <= n) {
      *reinterpret_cast<uint4*>(to + i) =
          make_uint4(Pack<To>(low[v].x, low[v].y), Pack<To>(low[v].z, low[v].w),
                     Pack<To>(high[v].x, high[v].y), Pack<To>(high[v].z, high[v].w));
    } else {
#pragma unroll 1
      for (int64_t j = i; j < n; ++j) to[j] = static_cast<uint16_t>(To::Of(from[j]));
    }
  }
}

template <typename From>
__device__ __forceinline__ float4 Unpack(uint32_t first, uint32_t second) {
  return make_float4(From::Of(first & 0xffff), From::Of(first >> 16), From::Of(second & 0xffff),
                     From::Of(second >> 16));
}

template <typename From>
__global__ void __launch_bounds__(kThreads)
    WidenVectors(const uint16_t* __restrict__ from, int64_t n, float* __restrict__ to) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kPerBlock;
  uint4 halves[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = block + (v * kThreads + static_cast<int>(threadIdx.x)) * kAtOnce;
    if (i + kAtOnce <= n) halves[v] = __ldcs(reinterpret_cast<const uint4*>(from + i));
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = block + (v * kThreads + static_cast<int>(threadIdx.x)) * kAtOnce;
    if (i + kAtOnce <= n) {
      auto* const vectors = reinterpret_cast<float4*>(to + i);
      vectors[0] = Unpack<From>(halves[v].x, halves[v].y);
      vectors[1] = Unpack<From>(halves[v].z, halves[v].w);
    } else {
#pragma unroll 1
      for (int64_t j = i; j < n; ++j) to[j] = From::Of(from[j]);
    }
  }
}

// For arrays at any address: neighbouring threads have neighbouring numbers.
template <typename Conversion, typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    ConvertEach(const From* __restrict__ from, int64_t n, To* __restrict__ to) {
  constexpr int kEach = kAtOnce * kVectors;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPerBlock + threadIdx.x;
  From numbers[kEach];
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    if (first + u * kThreads < n) numbers[u] = __ldcs(from + first + u * kThreads);
  }
#pragma unroll
  for (int u = 0; u < kEach; ++u) {
    if (first + u * kThreads < n) {
      to[first + u * kThreads] = static_cast<To>(Conversion::Of(numbers[u]));
    }
  }
}

template <typename Conversion>
absl::Status Narrow(const void* from, int64_t n, void* to, dim3 grid, cudaStream_t stream) {
  const bool vectors = IsAligned16(from) && IsAligned16(to);
  return CudaStatus(
      kName, "launching the kernel",
      LaunchKernel(vectors ? &NarrowVectors<Conversion> : &ConvertEach<Conversion, float, uint16_t>,
                   grid, dim3(kThreads), 0, stream, static_cast<const float*>(from), n,
                   static_cast<uint16_t*>(to)));
}

template <typename Conversion>
absl::Status Widen(const void* from, int64_t n, void* to, dim3 grid, cudaStream_t stream) {
  const bool vectors = IsAligned16(from) && IsAligned16(to);
  return CudaStatus(
      kName, "launching the kernel",
      LaunchKernel(vectors ? &WidenVectors<Conversion> : &ConvertEach<Conversion, uint16_t, float>,
                   grid, dim3(kThreads), 0, stream, static_cast<const uint16_t*>(from), n,
                   static_cast<float*>(to)));
}

// ---- Rows of int8: kRowThreads threads a row, one warp or the whole block. ----

// Threads of a block that has rows of so many threads.
constexpr int BlockThreads(int row_threads) {
  return row_threads < kThreads ? kThreads : row_threads;
}

// Rows of so many threads: more for long rows, so that few rows are under way and what the first
// walk over a row brought into the cache is there for the second.
int RowThreads(int64_t columns) { return columns <= 1024 ? kWarp : columns <= 8192 ? 256 : 1024; }

// The largest over the threads of a row; all of them get it.
template <int kRowThreads>
__device__ __forceinline__ uint32_t RowMax(uint32_t value) {
  value = __reduce_max_sync(0xffffffffu, value);
  if constexpr (kRowThreads == kWarp) return value;
  CODISTILL_SHARED(uint32_t[32], maxima);
  if (threadIdx.x % kWarp == 0) maxima[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return __reduce_max_sync(0xffffffffu, lane < kRowThreads / kWarp ? maxima[lane] : 0u);
}

constexpr int kQuartersAtOnce = 4;  // vectors of four numbers

template <int kRowThreads, bool kVector>
__global__ void __launch_bounds__(BlockThreads(kRowThreads))
    QuantizeKernel(const float* __restrict__ from, int64_t rows, int64_t columns,
                   int8_t* __restrict__ to, float* __restrict__ scales, Lowest* bad_row) {
  constexpr int kRows = BlockThreads(kRowThreads) / kRowThreads;
  const int lane = static_cast<int>(threadIdx.x) % kRowThreads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kRowThreads;
  if (row >= rows) return;  // a whole warp, or none of the block
  const float* const x = from + row * columns;
  int8_t* const q = to + row * columns;
  const auto* const x4 = reinterpret_cast<const float4*>(x);
  const int64_t vectors = kVector ? columns / 4 : 0;

  // As whole numbers, magnitudes are in the same order, with what is not finite on top.
  uint32_t largest = 0;
  auto take = [&largest](float value) {
    largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
  };
  for (int64_t v = lane; v < vectors; v += kQuartersAtOnce * kRowThreads) {
    float4 values[kQuartersAtOnce];
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      values[u] =
          v + u * kRowThreads < vectors ? __ldg(x4 + v + u * kRowThreads) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      take(values[u].x);
      take(values[u].y);
      take(values[u].z);
      take(values[u].w);
    }
  }
  for (int64_t c = 4 * vectors + lane; c < columns; c += kRowThreads) take(__ldg(x + c));
  largest = RowMax<kRowThreads>(largest);
  if (largest >= 0x7f800000u) {
    if (lane == 0) atomicMin(bad_row, static_cast<Lowest>(row));
    return;
  }
  const float magnitude = __uint_as_float(largest);
  const bool zeros = magnitude < 0x1p-100f;
  const float inverse = zeros ? 0 : 127 / magnitude;
  if (lane == 0) scales[row] = zeros ? 0 : magnitude / 127;

  auto quantize = [inverse](float value) {
    return static_cast<signed char>(__float2int_rn(__fmul_rn(value, inverse)));
  };
  auto* const q4 = reinterpret_cast<char4*>(q);
  for (int64_t v = lane; v < vectors; v += kQuartersAtOnce * kRowThreads) {
    float4 values[kQuartersAtOnce];
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      if (v + u * kRowThreads < vectors) values[u] = __ldg(x4 + v + u * kRowThreads);
    }
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      if (v + u * kRowThreads >= vectors) continue;
      q4[v + u * kRowThreads] = make_char4(quantize(values[u].x), quantize(values[u].y),
                                           quantize(values[u].z), quantize(values[u].w));
    }
  }
  for (int64_t c = 4 * vectors + lane; c < columns; c += kRowThreads) q[c] = quantize(__ldg(x + c));
}

template <int kRowThreads, bool kVector>
__global__ void __launch_bounds__(BlockThreads(kRowThreads))
    DequantizeKernel(const int8_t* __restrict__ from, const float* __restrict__ scales,
                     int64_t rows, int64_t columns, float* __restrict__ to) {
  constexpr int kRows = BlockThreads(kRowThreads) / kRowThreads;
  const int lane = static_cast<int>(threadIdx.x) % kRowThreads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kRowThreads;
  if (row >= rows) return;
  const float scale = __ldg(scales + row);
  const int8_t* const q = from + row * columns;
  float* const x = to + row * columns;
  const auto* const q4 = reinterpret_cast<const char4*>(q);
  auto* const x4 = reinterpret_cast<float4*>(x);
  const int64_t vectors = kVector ? columns / 4 : 0;
  auto number = [scale](signed char value) { return __fmul_rn(static_cast<float>(value), scale); };
  for (int64_t v = lane; v < vectors; v += kQuartersAtOnce * kRowThreads) {
    char4 values[kQuartersAtOnce];
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      if (v + u * kRowThreads < vectors) values[u] = __ldg(q4 + v + u * kRowThreads);
    }
#pragma unroll
    for (int u = 0; u < kQuartersAtOnce; ++u) {
      if (v + u * kRowThreads >= vectors) continue;
      x4[v + u * kRowThreads] = make_float4(number(values[u].x), number(values[u].y),
                                            number(values[u].z), number(values[u].w));
    }
  }
  for (int64_t c = 4 * vectors + lane; c < columns; c += kRowThreads) x[c] = number(__ldg(q + c));
}

template <int kRowThreads>
absl::Status Quantize(const float* from, int64_t rows, int64_t columns, int8_t* to, float* scales,
                      Lowest* bad_row, bool vectors, cudaStream_t stream) {
  constexpr int kBlock = BlockThreads(kRowThreads), kRows = kBlock / kRowThreads;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kName, "rows", blocks));
  return CudaStatus(kName, "launching the kernel",
                    LaunchKernel(vectors ? &QuantizeKernel<kRowThreads, true>
                                         : &QuantizeKernel<kRowThreads, false>,
                                 dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 0, stream, from,
                                 rows, columns, to, scales, bad_row));
}

template <int kRowThreads>
absl::Status Dequantize(const int8_t* from, const float* scales, int64_t rows, int64_t columns,
                        float* to, bool vectors, cudaStream_t stream) {
  constexpr int kBlock = BlockThreads(kRowThreads), kRows = kBlock / kRowThreads;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kName, "rows", blocks));
  return CudaStatus(kName, "launching the kernel",
                    LaunchKernel(vectors ? &DequantizeKernel<kRowThreads, true>
                                         : &DequantizeKernel<kRowThreads, false>,
                                 dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 0, stream, from,
                                 scales, rows, columns, to));
}

}  // namespace

absl::Status LaunchConvert(const void* from, NumberFormat from_format, int64_t n, void* to,
                           NumberFormat to_format, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateConversion(from, from_format, n, to, to_format));
  if (n == 0) return absl::OkStatus();
  const int64_t blocks = n / kPerBlock + (n % kPerBlock != 0 ? 1 : 0);
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kName, "n", blocks));
  const dim3 grid(static_cast<unsigned>(blocks));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (to_format == NumberFormat::kFloat16) {
    return Narrow<AsFloat16>(from, n, to, grid, cuda_stream);
  }
  if (to_format == NumberFormat::kBfloat16) {
    return Narrow<AsBfloat16>(from, n, to, grid, cuda_stream);
  }
  if (from_format == NumberFormat::kFloat16) {
    return Widen<OfFloat16>(from, n, to, grid, cuda_stream);
  }
  return Widen<OfBfloat16>(from, n, to, grid, cuda_stream);
}

absl::Status LaunchQuantizeRows(const float* from, int64_t rows, int64_t columns, int8_t* to,
                                float* scales, void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateInt8Rows(from, scales, rows, columns, to));
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  CODISTILL_RETURN_IF_ERROR(ClearLowest(kName, workspace, 1, cuda_stream));
  if (rows == 0) return absl::OkStatus();
  auto* const bad = static_cast<Lowest*>(workspace);
  const bool vectors = columns % 4 == 0 && IsAligned16(from) && IsAligned16(to);
  switch (RowThreads(columns)) {
    case kWarp:
      return Quantize<kWarp>(from, rows, columns, to, scales, bad, vectors, cuda_stream);
    case 256:
      return Quantize<256>(from, rows, columns, to, scales, bad, vectors, cuda_stream);
    default:
      return Quantize<1024>(from, rows, columns, to, scales, bad, vectors, cuda_stream);
  }
}

absl::Status FinishQuantizeRows(const void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kName, workspace));
  int64_t bad = -1;
  CODISTILL_RETURN_IF_ERROR(
      FetchReport(kName, workspace, sizeof(bad), &bad, static_cast<cudaStream_t>(stream)));
  return bad < 0 ? absl::OkStatus() : RowNotFinite(bad);
}

absl::Status LaunchDequantizeRows(const int8_t* from, const float* scales, int64_t rows,
                                  int64_t columns, float* to, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateInt8Rows(from, scales, rows, columns, to));
  if (rows == 0 || columns == 0) return absl::OkStatus();
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool vectors = columns % 4 == 0 && IsAligned16(from) && IsAligned16(to);
  switch (RowThreads(columns)) {
    case kWarp:
      return Dequantize<kWarp>(from, scales, rows, columns, to, vectors, cuda_stream);
    case 256:
      return Dequantize<256>(from, scales, rows, columns, to, vectors, cuda_stream);
    default:
      return Dequantize<1024>(from, scales, rows, columns, to, vectors, cuda_stream);
  }
}

}  // namespace codistill
