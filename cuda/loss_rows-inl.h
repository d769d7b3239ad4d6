// What the loss kernels share: rows of numbers in any format, walks over them, sums over a block.
// For .cu files.

#ifndef CODISTILL_CUDA_LOSS_ROWS_INL_H_
#define CODISTILL_CUDA_LOSS_ROWS_INL_H_

#include <cfloat>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/loss_params.h"

namespace codistill::internal {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;
// Sums of logarithms beyond this come from a logarithm of 0, for which -FLT_MAX stands: 0 times it
// is 0.
constexpr float kInfiniteSum = 1e20f;

template <NumberFormat kFormat>
struct Number;
template <>
struct Number<NumberFormat::kFloat32> {
  static constexpr int kBytes = 4;
  static __device__ __forceinline__ float One(const unsigned char* at) {
    return *reinterpret_cast<const float*>(at);
  }
  static __device__ __forceinline__ void Four(const unsigned char* at, float* out) {
    const float4 v = *reinterpret_cast<const float4*>(at);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
};
template <>
struct Number<NumberFormat::kBfloat16> {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ float One(const unsigned char* at) {
    return __uint_as_float(static_cast<unsigned>(*reinterpret_cast<const uint16_t*>(at)) << 16);
  }
  static __device__ __forceinline__ void Four(const unsigned char* at, float* out) {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    out[0] = __uint_as_float(v.x << 16), out[1] = __uint_as_float(v.x & 0xffff0000u);
    out[2] = __uint_as_float(v.y << 16), out[3] = __uint_as_float(v.y & 0xffff0000u);
  }
};
template <>
struct Number<NumberFormat::kFloat16> {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ float One(const unsigned char* at) {
    return __half2float(*reinterpret_cast<const __half*>(at));
  }
  static __device__ __forceinline__ void Four(const unsigned char* at, float* out) {
    struct alignas(8) Halves {
      __half2 low, high;
    };
    const Halves v = *reinterpret_cast<const Halves*>(at);
    const float2 low = __half22float2(v.low), high = __half22float2(v.high);
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  }
};
template <>
struct Number<NumberFormat::kInt8> {
  static constexpr int kBytes = 1;
  static __device__ __forceinline__ float One(const unsigned char* at) {
    return static_cast<float>(static_cast<signed char>(*at));
  }
  static __device__ __forceinline__ void Four(const unsigned char* at, float* out) {
    const char4 v = *reinterpret_cast<const char4*>(at);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  }
};

// What a thread takes at once: kChunks times four neighbours, or one element of the few before the
// first and after the last aligned four.
template <int kChunks, int kWidth>
struct Piece {
  static constexpr int chunks = kChunks, width = kWidth;
};

// A part of a row, [begin, begin + count) of the classes, in elements from its begin. Fours are
// aligned as elements of the whole tensor are, so that they are in every array whose base is.
struct Part {
  int32_t begin, count;
  int32_t head, fours;  // elements before the first four; number of fours

  __device__ Part(int64_t row, int32_t classes, int32_t first, int32_t last) {
    begin = first;
    count = last - first;
    const int misaligned = static_cast<int>((row * classes + first) & 3);
    head = min((4 - misaligned) & 3, count);
    fours = (count - head) / 4;
  }

  // body(Piece, i, step): this thread's elements; those of chunk u start at i + u * step. Every
  // walk of a part gives a thread the same elements. `thread` of `threads`: who walks together, at
  // least six.
  template <int kUnroll, typename Body>
  __device__ __forceinline__ void Walk(int thread, int threads, Body body) const {
    const int end = head + 4 * fours, step = 4 * threads;
    int i = head + 4 * thread;
    for (; i + (kUnroll - 1) * step < end; i += kUnroll * step) body(Piece<kUnroll, 4>(), i, step);
    if (kUnroll > 1) {
      for (; i < end; i += step) body(Piece<1, 4>(), i, step);
    }
    const int edge = thread < head ? thread : end + thread - head;
    if (thread < head || edge < count) body(Piece<1, 1>(), edge, 0);
  }
};

// A part of a row in memory of either kind.
template <NumberFormat kFormat>
struct Numbers {
  const unsigned char* at;  // the part's first element
  bool aligned;             // fours can be loaded in one go

  __device__ Numbers() {}
  __device__ Numbers(const unsigned char* at, const Part& part) : at(at) {
    constexpr int kBytes = Number<kFormat>::kBytes;
    aligned = (reinterpret_cast<uintptr_t>(at) + part.head * kBytes) % (4 * kBytes) == 0;
  }

  __device__ __forceinline__ float One(int i) const {
    return Number<kFormat>::One(at + static_cast<int64_t>(i) * Number<kFormat>::kBytes);
  }

  template <int kChunks>
  __device__ __forceinline__ void Load(Piece<kChunks, 4>, int i, int step,
                                       float (&out)[kChunks][4]) const {
    constexpr int kBytes = Number<kFormat>::kBytes;
    const unsigned char* const from = at + static_cast<int64_t>(i) * kBytes;
    if (aligned) {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        Number<kFormat>::Four(from + static_cast<int64_t>(u * step) * kBytes, out[u]);
      }
    } else {
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out[u][j] = Number<kFormat>::One(from + static_cast<int64_t>(u * step + j) * kBytes);
        }
      }
    }
  }
  __device__ __forceinline__ void Load(Piece<1, 1>, int i, int, float (&out)[1][1]) const {
    out[0][0] = One(i);
  }
};

// The same for a format known at run time, with a scale.
struct AnyNumbers {
  const unsigned char* at;
  NumberFormat format;
  bool aligned;
  float scale;

  __device__ AnyNumbers() {}
  __device__ AnyNumbers(const unsigned char* at, NumberFormat format, float scale, const Part& part)
      : at(at), format(format), scale(scale) {
    const int bytes = static_cast<int>(BytesOfNumber(format));
    aligned = (reinterpret_cast<uintptr_t>(at) + part.head * bytes) % (4 * bytes) == 0;
  }

  static __device__ __forceinline__ int BytesOfNumber(NumberFormat format) {
    return format == NumberFormat::kFloat32 ? 4 : format == NumberFormat::kInt8 ? 1 : 2;
  }

  template <NumberFormat kFormat>
  __device__ __forceinline__ Numbers<kFormat> As() const {
    Numbers<kFormat> numbers;
    numbers.at = at;
    numbers.aligned = aligned;
    return numbers;
  }

  template <typename Piece, int kChunks, int kWidth>
  __device__ __forceinline__ void Load(Piece piece, int i, int step,
                                       float (&out)[kChunks][kWidth]) const {
    switch (format) {
      case NumberFormat::kFloat32:
        As<NumberFormat::kFloat32>().Load(piece, i, step, out);
        break;
      case NumberFormat::kBfloat16:
        As<NumberFormat::kBfloat16>().Load(piece, i, step, out);
        break;
      case NumberFormat::kFloat16:
        As<NumberFormat::kFloat16>().Load(piece, i, step, out);
        break;
      case NumberFormat::kInt8:
        As<NumberFormat::kInt8>().Load(piece, i, step, out);
#pragma unroll
        for (int u = 0; u < kChunks; ++u) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) out[u][j] *= scale;
        }
        break;
    }
  }
};

// The gradient's part of a row; written past the caches, as nobody reads it soon.
template <NumberFormat kFormat>
struct GradientPart {
  unsigned char* at;
  bool aligned;

  __device__ GradientPart(unsigned char* at, const Part& part) : at(at) {
    constexpr int kBytes = Number<kFormat>::kBytes;
    aligned = (reinterpret_cast<uintptr_t>(at) + part.head * kBytes) % (4 * kBytes) == 0;
  }

  __device__ __forceinline__ void StoreOne(int i, float value) const {
    if (kFormat == NumberFormat::kFloat32) {
      reinterpret_cast<float*>(at)[i] = value;
    } else {
      reinterpret_cast<__nv_bfloat16*>(at)[i] = __float2bfloat16_rn(value);
    }
  }

  template <int kChunks, int kWidth>
  __device__ __forceinline__ void Store(Piece<kChunks, kWidth>, int i, int step,
                                        const float (&value)[kChunks][kWidth]) const {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      if constexpr (kWidth == 4) {
        if (aligned) {
          Four(at + static_cast<int64_t>(i + u * step) * Number<kFormat>::kBytes, value[u]);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < kWidth; ++j) StoreOne(i + u * step + j, value[u][j]);
    }
  }

 private:
  static __device__ __forceinline__ void Four(unsigned char* to, const float* v) {
    if (kFormat == NumberFormat::kFloat32) {
      __stcs(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]);
      const __nv_bfloat162 high = __floats2bfloat162_rn(v[2], v[3]);
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(*reinterpret_cast<const unsigned*>(&low),
                                                      *reinterpret_cast<const unsigned*>(&high)));
    }
  }
};

// Copies [from, from + bytes) into shared memory that has 16 bytes to spare, asynchronously;
// returns where. The copy is misaligned as the source is, so that all but its ends goes by 16
// bytes.
__device__ __forceinline__ const unsigned char* CopyIn(const unsigned char* from, int bytes,
                                                       unsigned char* to) {
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
  to += misaligned;
  const int head = min((16 - misaligned) & 15, bytes);
  const int vectors = (bytes - head) / 16;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int v = thread; v < vectors; v += threads) {
    AsyncCopy16(to + head + 16 * v, from + head + 16 * v);
  }
  AsyncCommit();
  const int end = head + 16 * vectors;
  if (thread < head) to[thread] = from[thread];
  if (thread < bytes - end) to[end + thread] = from[end + thread];
  return to;
}

// ---- Sums. ----

// Sum of exp(x / T), with what has been taken off the x: the first one seen, or a later one that
// exceeded it so far that the sum might have overflowed. `rate` is log2(e) / T.
struct ExpSum {
  float reference = -FLT_MAX;
  float sum = 0;

  // Moves the reference if x exceeds it by more than `slack`. `plain` is a sum of the same x with T
  // = 1.
  __device__ __forceinline__ void MakeRoom(float x, float slack, float rate, float* plain) {
    if (x > reference + slack) {
      sum *= FastExp2((reference - x) * rate);
      *plain *= FastExp2((reference - x) * kLog2E);
      reference = x;
    }
  }
  __device__ __forceinline__ void MakeRoom(float x, float slack, float rate) {
    float none = 0;
    MakeRoom(x, slack, rate, &none);
  }

  __device__ __forceinline__ void Merge(const ExpSum& other, float rate) {
    const float larger = fmaxf(reference, other.reference);
    sum = fmaf(other.sum, FastExp2((other.reference - larger) * rate),
               sum * FastExp2((reference - larger) * rate));
    reference = larger;
  }
};

template <typename T>
__device__ __forceinline__ T WarpSum(T value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Over the block, whose threads are whole warps; every thread gets it. `storage` is shared: 32
// places that nobody reads any more.
__device__ __forceinline__ double BlockSum(double value, double* storage) {
  value = WarpSum(value);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  __syncthreads();
  if (lane == 0) storage[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x / 32) ? storage[lane] : 0;
  return WarpSum(value);
}

// The first class whose logit is not finite, with the logit; in a form whose least is wanted.
constexpr unsigned long long kNoBadLogit = ~0ull;  // NOLINT(runtime/int): CUDA's
__device__ __forceinline__ unsigned long long BadLogit(int32_t c, float z) {  // NOLINT
  return static_cast<unsigned long long>(c) << 32 | __float_as_uint(z);       // NOLINT
}
__device__ __forceinline__ unsigned long long WarpMin(unsigned long long value) {  // NOLINT
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = min(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// The weight of a row; 0 if it does not count.
__device__ __forceinline__ float RowWeight(const LossParams& params, int64_t row) {
  if (params.has_ignored && params.labels[row] == params.ignored_label) return 0;
  return params.row_weights == nullptr ? 1 : params.row_weights[row];
}

// What the gradient of a row is multiplied by.
__device__ __forceinline__ float RowScale(const LossParams& params, float weight) {
  double scale = params.row_scale * weight;
  if (params.prepared) {
    const double sum = params.result->weight_sum;
    scale = sum > 0 ? scale / sum : 0;
  }
  return static_cast<float>(scale);
}

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_LOSS_ROWS_INL_H_
