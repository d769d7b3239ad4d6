// Softmax cross-entropy with distillation, loss and gradient in one launch: a block a row or, from
// sm_90 on, a cluster of blocks a row. For .cu files.
//
// The part of a row that a block has is kept in shared memory where it fits, teacher included, so
// that device memory is read once and several blocks of a multiprocessor, each at another stage,
// keep it busy; clusters make parts small enough for that. Where it does not fit, rows are read
// twice.
//
// The first walk sums exponentials, relative to a number that is raised only where they could
// overflow (an exponential an element); the second writes the gradient and sums the losses, which
// are then exact where a difference of sums would cancel. Each thread takes the same elements in
// each walk, reads them before it writes and sums are combined in a fixed order: the gradient may
// replace the logits, and results repeat bit for bit.

#ifndef CODISTILL_CUDA_SOFTMAX_LOSS_KERNEL_INL_H_
#define CODISTILL_CUDA_SOFTMAX_LOSS_KERNEL_INL_H_

#include <cfloat>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/loss_params.h"
#include "cuda/loss_rows-inl.h"
#include "cuda/topk_loss_kernel-inl.h"

namespace codistill::internal {

// kPlain: without teachers. kOne: one dense teacher, kMatch. kGeneral: anything, without clusters.
enum class SoftmaxMode { kPlain, kOne, kGeneral };

// ---- A row's sums, over threads, warps, blocks of a cluster. ----

struct RowSums {
  ExpSum student;
  float plain = 0;  // the student's sum with T = 1
  float wrong = 0;  // 1: an element says that the row is not correct
  ExpSum teacher;   // of probabilities: only their sum
  float least = 0;  // and the least of them, if it is negative

  static constexpr int kFloats = 7;
  __device__ __forceinline__ float* floats() { return &student.reference; }

  __device__ __forceinline__ void Merge(const RowSums& other, float rate) {
    const float larger = fmaxf(student.reference, other.student.reference);
    plain = fmaf(other.plain, FastExp2((other.student.reference - larger) * kLog2E),
                 plain * FastExp2((student.reference - larger) * kLog2E));
    student.Merge(other.student, rate);
    wrong = fmaxf(wrong, other.wrong);
    teacher.Merge(other.teacher, rate);
    least = fminf(least, other.least);
  }

  __device__ __forceinline__ void MergeWarp(float rate) {
#pragma unroll 1
    for (int offset = 16; offset > 0; offset /= 2) {
      RowSums other;
#pragma unroll
      for (int i = 0; i < kFloats; ++i) {
        other.floats()[i] = __shfl_xor_sync(kAllLanes, floats()[i], offset);
      }
      Merge(other, rate);
    }
  }
};
static_assert(sizeof(RowSums) == RowSums::kFloats * sizeof(float));

constexpr int kMaxParts = 8;
using WarpFloats = float[32][8];
using PartFloats = float[kMaxParts][8];

// Merges over the block and, with parts > 1, over the cluster, of which this block is `rank`; every
// thread gets the same. A cluster's blocks must have started: ClusterArrive() has been called.
__device__ __forceinline__ RowSums MergeRow(RowSums mine, float rate, int parts, int rank,
                                            WarpFloats& of_warps, PartFloats& of_parts) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  mine.MergeWarp(rate);
  if (parts > 1) ClusterWait();
  __syncthreads();  // of an earlier merge all have read
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < RowSums::kFloats; ++i) of_warps[warp][i] = mine.floats()[i];
  }
  __syncthreads();
  if (warp == 0) {
    RowSums all;
    if (lane < static_cast<int>(blockDim.x / 32)) {
#pragma unroll
      for (int i = 0; i < RowSums::kFloats; ++i) all.floats()[i] = of_warps[lane][i];
    }
    all.MergeWarp(rate);
    // That of lane 0 is the one: others may have rounded otherwise.
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < RowSums::kFloats; ++i) of_warps[0][i] = all.floats()[i];
    }
    __syncwarp();
    for (int i = lane; i < 8 * parts; i += 32) {
      if (i % 8 >= RowSums::kFloats) continue;
      if (parts > 1) {
        ClusterStore(&of_parts[rank][i % 8], static_cast<unsigned>(i / 8), of_warps[0][i % 8]);
      } else {
        of_parts[0][i] = of_warps[0][i];
      }
    }
  }
  if (parts > 1) {
    ClusterArrive();
    ClusterWait();
  } else {
    __syncthreads();
  }
  RowSums total;
  for (int part = 0; part < parts; ++part) {
    RowSums sums;
#pragma unroll
    for (int i = 0; i < RowSums::kFloats; ++i) sums.floats()[i] = of_parts[part][i];
    if (part == 0) {
      total = sums;
    } else {
      total.Merge(sums, rate);
    }
  }
  return total;
}

// ---- Walks. ----

// exp(d) for e = exp(d / T), with T = power if that is not 0.
__device__ __forceinline__ float Unwarmed(float e, float d, int power) {
  if (power == 0) return FastExp2(d * kLog2E);
  const float square = e * e;
  return power == 2 ? square : power == 3 ? square * e : square * square;
}

// Adds this thread's elements of `numbers` to *sum and, unless power is 1, exp of them with T = 1
// to *plain, and takes the largest in *best.
template <int kUnroll, typename Source>
__device__ __forceinline__ void SumExps(const Part& part, const Source& numbers, float rate,
                                        float slack, int power, ExpSum* sum, float* plain,
                                        float* best) {
  part.Walk<kUnroll>(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                     [&](auto piece, int i, int step) {
                       constexpr int kChunks = decltype(piece)::chunks;
                       constexpr int kWidth = decltype(piece)::width;
                       float x[kChunks][kWidth];
                       numbers.Load(piece, i, step, x);
                       float top = x[0][0];
#pragma unroll
                       for (int u = 0; u < kChunks; ++u) {
#pragma unroll
                         for (int j = 0; j < kWidth; ++j) top = fmaxf(top, x[u][j]);
                       }
                       *best = fmaxf(*best, top);
                       sum->MakeRoom(top, slack, rate, plain);
#pragma unroll
                       for (int u = 0; u < kChunks; ++u) {
#pragma unroll
                         for (int j = 0; j < kWidth; ++j) {
                           const float d = x[u][j] - sum->reference;
                           const float e = FastExp2(d * rate);
                           sum->sum += e;
                           if (power != 1) *plain += Unwarmed(e, d, power);
                         }
                       }
                     });
}

// Adds up probabilities, and finds whether one is negative.
template <int kUnroll, typename Source>
__device__ __forceinline__ void SumProbabilities(const Part& part, const Source& numbers,
                                                 float* sum, float* least) {
  part.Walk<kUnroll>(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x),
                     [&](auto piece, int i, int step) {
                       constexpr int kChunks = decltype(piece)::chunks;
                       constexpr int kWidth = decltype(piece)::width;
                       float q[kChunks][kWidth];
                       numbers.Load(piece, i, step, q);
#pragma unroll
                       for (int u = 0; u < kChunks; ++u) {
#pragma unroll
                         for (int j = 0; j < kWidth; ++j) {
                           *sum += q[u][j];
                           *least = fminf(*least, q[u][j]);
                         }
                       }
                     });
}

// A softmax as far as the second walk needs it: log2 of what it gives x is
// (x - reference) * rate - log_sum.
struct Softmax {
  float reference, log_sum;
  __device__ __forceinline__ float Log2(float x, float rate) const {
    return fmaf(x - reference, rate, -log_sum);
  }
};

// Several dense teachers, or one that kOne does not take.
struct DenseTeachers {
  const LossParams& params;
  const AnyNumbers* teachers;  // in shared memory, as is what follows
  const Softmax* softmaxes;    // of probabilities: `reference` is 1 / their sum
  float rate;

  template <typename Piece, int kChunks, int kWidth>
  __device__ __forceinline__ void MeanLogits(Piece piece, int i, int step,
                                             float (&out)[kChunks][kWidth]) const {
#pragma unroll
    for (int j = 0; j < kChunks * kWidth; ++j) out[j / kWidth][j % kWidth] = 0;
#pragma unroll 1
    for (int k = 0; k < params.num_dense; ++k) {
      float x[kChunks][kWidth];
      teachers[k].Load(piece, i, step, x);
#pragma unroll
      for (int j = 0; j < kChunks * kWidth; ++j)
        out[j / kWidth][j % kWidth] += x[j / kWidth][j % kWidth];
    }
    const float count = static_cast<float>(params.num_dense);
#pragma unroll
    for (int j = 0; j < kChunks * kWidth; ++j) out[j / kWidth][j % kWidth] /= count;
  }

  // What the average of the teachers gives, and its log2; the latter is exact where the former
  // vanishes.
  template <typename Piece, int kChunks, int kWidth>
  __device__ __forceinline__ void Average(Piece piece, int i, int step, bool with_log,
                                          float (&q)[kChunks][kWidth],
                                          float (&log_q)[kChunks][kWidth]) const {
    if (params.average_logits) {
      MeanLogits(piece, i, step, log_q);
#pragma unroll
      for (int j = 0; j < kChunks * kWidth; ++j) {
        float& log = log_q[j / kWidth][j % kWidth];
        log = softmaxes[0].Log2(log, rate);
        q[j / kWidth][j % kWidth] = FastExp2(log);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunks * kWidth; ++j) {
      q[j / kWidth][j % kWidth] = 0;
      log_q[j / kWidth][j % kWidth] = -FLT_MAX;
    }
#pragma unroll 1
    for (int k = 0; k < params.num_dense; ++k) {
      float x[kChunks][kWidth];
      teachers[k].Load(piece, i, step, x);
      const Softmax softmax = softmaxes[k];
      const bool given = params.dense[k].probabilities;
#pragma unroll
      for (int j = 0; j < kChunks * kWidth; ++j) {
        float& value = x[j / kWidth][j % kWidth];
        float log = 0;
        if (given) {
          value *= softmax.reference;
          if (with_log) log = fmaxf(FastLog2(value), -126);
        } else {
          log = softmax.Log2(value, rate);
          value = FastExp2(log);
        }
        q[j / kWidth][j % kWidth] += value;
        if (!with_log) continue;
        // log2 of a sum of powers.
        float& sum = log_q[j / kWidth][j % kWidth];
        log = fmaxf(log, -FLT_MAX);
        const float larger = fmaxf(sum, log);
        sum = k == 0 ? log : larger + FastLog2(FastExp2(sum - larger) + FastExp2(log - larger));
      }
    }
    if (params.num_dense == 1) return;
    const float count = static_cast<float>(params.num_dense);
    const float log_count = log2f(count);
#pragma unroll
    for (int j = 0; j < kChunks * kWidth; ++j) {
      q[j / kWidth][j % kWidth] /= count;
      log_q[j / kWidth][j % kWidth] -= log_count;
    }
  }
};

using TeacherNumbers = AnyNumbers[kMaxTeachers];
using TeacherSoftmaxes = Softmax[kMaxTeachers];

// ---- The kernel. ----

// kKept: all of the row's arrays are in shared memory. Otherwise params say which.
template <NumberFormat kLogits, SoftmaxMode kMode, bool kKept>
__global__ void __launch_bounds__(kMode == SoftmaxMode::kGeneral ? 512 : 1024)
    SoftmaxLossKernel(const __grid_constant__ LossParams params) {
  constexpr bool kPlain = kMode == SoftmaxMode::kPlain, kOne = kMode == SoftmaxMode::kOne;
  constexpr bool kGeneral = kMode == SoftmaxMode::kGeneral;
  constexpr int kBytes = Number<kLogits>::kBytes;
  // Elements under way at a time, where they come from far.
  constexpr int kFirstUnroll = kKept ? 2 : 4, kSecondUnroll = kPlain ? 2 : 1;
  CODISTILL_SHARED(WarpFloats, of_warps);
  CODISTILL_SHARED(PartFloats, of_parts);
  CODISTILL_SHARED(double[32], storage);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int classes = params.classes;
  const int parts = kGeneral ? 1 : params.parts;
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  const int shift = static_cast<int>((row * classes) & 3);
  const int first = min(max(rank * params.part_elements - shift, 0), classes);
  const int last =
      min(rank == parts - 1 ? classes : (rank + 1) * params.part_elements - shift, classes);
  const Part part(row, classes, first, max(first, last));
  const int64_t offset = row * classes + first;

  RowPart result = {};
  result.bad_class = -1;
  const bool write = params.gradient != nullptr;
  const GradientPart<kLogits> gradient(params.gradient + offset * kBytes, part);
  const int64_t label = params.labels[row];
  const float weight = RowWeight(params, row);
  const bool ignored = params.has_ignored && label == params.ignored_label;
  if (!ignored && (label < 0 || label >= classes)) {
    result.array_fault = 1;
    if (thread == 0) params.row_parts[blockIdx.x] = result;
    return;
  }
  if (!(weight > 0)) {
    if (write) {
      part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
        const float zero[decltype(piece)::chunks][decltype(piece)::width] = {};
        gradient.Store(piece, i, step, zero);
      });
    }
    if (thread == 0) params.row_parts[blockIdx.x] = result;
    return;
  }
  result.weight = weight;

  // Fetch what is kept, or point to where it is.
  if (parts > 1) ClusterArrive();
  const unsigned char* z_at = params.logits + offset * kBytes;
  const float label_logit = Number<kLogits>::One(params.logits + (row * classes + label) * kBytes);
  if (kKept || params.logits_at >= 0) {
    z_at = CopyIn(z_at, part.count * kBytes, DynamicShared() + params.logits_at);
  }
  const Numbers<kLogits> z(z_at, part);
  AnyNumbers teacher;  // kOne's
  if (kOne) {
    const DenseParams& dense = params.dense[0];
    const int bytes = AnyNumbers::BytesOfNumber(dense.format);
    const unsigned char* at = dense.values + offset * bytes;
    if (kKept || params.teacher_at[0] >= 0) {
      at = CopyIn(at, part.count * bytes, DynamicShared() + params.teacher_at[0]);
    }
    teacher = AnyNumbers(at, dense.format, dense.scale == nullptr ? 1 : dense.scale[row], part);
  }
  CODISTILL_SHARED(TeacherNumbers, teachers);
  CODISTILL_SHARED(TeacherSoftmaxes, softmaxes);
  if (kGeneral) {
    for (int k = 0; k < params.num_dense; ++k) {
      const DenseParams& dense = params.dense[k];
      const int bytes = AnyNumbers::BytesOfNumber(dense.format);
      const unsigned char* at = dense.values + offset * bytes;
      if (params.teacher_at[k] >= 0) {
        at = CopyIn(at, part.count * bytes, DynamicShared() + params.teacher_at[k]);
      }
      const float scale = dense.scale == nullptr ? 1 : dense.scale[row];
      if (thread == 0) teachers[k] = AnyNumbers(at, dense.format, scale, part);
    }
  }

  // The first walk.
  const float rate = kPlain ? kLog2E : params.inverse_t * kLog2E;
  const float slack = kPlain ? 16 : 16 * fminf(1, params.temperature);
  const int power = kPlain ? 1 : params.power;
  RowSums mine;
  float best = -INFINITY;
  if (kOne && kKept) {
    AsyncWait<1>();  // the teacher may be under way still
  } else {
    AsyncWait<0>();
  }
  __syncthreads();
  SumExps<kFirstUnroll>(part, z, rate, slack, power, &mine.student, &mine.plain, &best);
  bool wrong = best > label_logit;
  if (best == label_logit) {
    // Rare but for the label's own thread: the first of the largest is wanted.
    part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
      constexpr int kWidth = decltype(piece)::width;
      float x[1][kWidth];
      z.Load(piece, i, step, x);
      for (int j = 0; j < kWidth; ++j) {
        wrong = wrong || (x[0][j] == label_logit && first + i + j < label);
      }
    });
  }
  mine.wrong = wrong ? 1 : 0;
  const bool given = kOne && params.dense[0].probabilities;
  if (kOne) {
    if (kKept) {
      AsyncWait<0>();
      __syncthreads();
    }
    if (given) {
      SumProbabilities<kFirstUnroll>(part, teacher, &mine.teacher.sum, &mine.least);
      mine.teacher.reference = 0;
    } else {
      float none = 0, largest = 0;
      SumExps<kFirstUnroll>(part, teacher, rate, slack, 1, &mine.teacher, &none, &largest);
    }
  }
  const RowSums sums = MergeRow(mine, rate, parts, rank, of_warps, of_parts);
  const float plain_sum = power == 1 ? sums.student.sum : sums.plain;
  const Softmax warm = {sums.student.reference, log2f(sums.student.sum)};
  const Softmax plain = {sums.student.reference, log2f(plain_sum)};
  Softmax taught = {0, 0};
  if (kOne) {
    taught = {given ? 1 / sums.teacher.sum : sums.teacher.reference, log2f(sums.teacher.sum)};
    // Not a number passes here: it makes the loss one.
    if (given && (sums.least < 0 || fabs(sums.teacher.sum - 1.0) > kCudaMassTolerance)) {
      result.teacher_fault = 1;
    }
  }

  // Where the sums are not finite, say why, before the gradient replaces the logits.
  unsigned long long bad = kNoBadLogit;  // NOLINT(runtime/int): CUDA's
  if (!isfinite(plain.log_sum) || !isfinite(warm.log_sum) || !isfinite(sums.student.reference) ||
      !isfinite(label_logit)) {
    part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
      constexpr int kWidth = decltype(piece)::width;
      float x[1][kWidth];
      z.Load(piece, i, step, x);
      for (int j = 0; j < kWidth; ++j) {
        if (!isfinite(x[0][j])) bad = min(bad, BadLogit(first + i + j, x[0][j]));
      }
    });
  }

  // What the general case knows besides.
  const DenseTeachers dense = {params, teachers, softmaxes, rate};
  TopKRow top_k;
  double topk_psi = 0;  // of all top-k teachers, / T^2, in bits
  float reverse = 0;    // the divergence itself, / T^2, in bits
  if (kGeneral) {
    if (params.psi == Psi::kMatch || params.psi == Psi::kReverse) {
      const int softmaxed = params.average_logits ? 1 : params.num_dense;
#pragma unroll 1
      for (int k = 0; k < softmaxed; ++k) {
        RowSums own;
        const bool probabilities = params.dense[k].probabilities;
        if (params.average_logits) {
          part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
            constexpr int kWidth = decltype(piece)::width;
            float x[1][kWidth];
            dense.MeanLogits(piece, i, step, x);
            for (int j = 0; j < kWidth; ++j) {
              own.teacher.MakeRoom(x[0][j], slack, rate);
              own.teacher.sum += FastExp2((x[0][j] - own.teacher.reference) * rate);
            }
          });
        } else if (probabilities) {
          SumProbabilities<2>(part, teachers[k], &own.teacher.sum, &own.least);
          own.teacher.reference = 0;
        } else {
          float none = 0, largest = 0;
          SumExps<kFirstUnroll>(part, teachers[k], rate, slack, 1, &own.teacher, &none, &largest);
        }
        own = MergeRow(own, rate, 1, 0, of_warps, of_parts);
        if (probabilities && (own.least < 0 || fabs(own.teacher.sum - 1.0) > kCudaMassTolerance)) {
          result.teacher_fault = 1;
        }
        if (thread == 0) {
          softmaxes[k] = {probabilities ? 1 / own.teacher.sum : own.teacher.reference,
                          log2f(own.teacher.sum)};
        }
      }
      __syncthreads();
    }
    if (params.num_topk > 0) {
      const bool good = top_k.Prepare(params, row, storage);
      if (!good) {
        result.array_fault = 1;
        if (thread == 0) params.row_parts[blockIdx.x] = result;
        return;
      }
      topk_psi = top_k.TakeStudent(
          storage, [&](int c) { return warm.Log2(z.One(c), rate); },
          // log2 of what the student gives all classes that `leave_out` does not.
          [&](auto leave_out) {
            RowSums others;
            part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
              constexpr int kWidth = decltype(piece)::width;
              float x[1][kWidth];
              z.Load(piece, i, step, x);
              for (int j = 0; j < kWidth; ++j) {
                if (leave_out(i + j)) continue;
                others.teacher.MakeRoom(x[0][j], slack, rate);
                others.teacher.sum += FastExp2((x[0][j] - others.teacher.reference) * rate);
              }
            });
            others = MergeRow(others, rate, 1, 0, of_warps, of_parts);
            return (others.teacher.reference - warm.reference) * rate + log2f(others.teacher.sum) -
                   warm.log_sum;
          });
    }
    if (params.psi == Psi::kReverse) {
      float sum = 0;
      part.template Walk<1>(thread, threads, [&](auto piece, int i, int step) {
        constexpr int kWidth = decltype(piece)::width;
        float x[1][kWidth], q[1][kWidth], log_q[1][kWidth];
        z.Load(piece, i, step, x);
        dense.Average(piece, i, step, true, q, log_q);
        for (int j = 0; j < kWidth; ++j) {
          const float log_p = warm.Log2(x[0][j], rate);
          sum += FastExp2(log_p) * (fmaxf(log_p, -FLT_MAX) - fmaxf(log_q[0][j], -FLT_MAX)) +
                 0 * q[0][j];
        }
      });
      if (!(fabsf(sum) < kInfiniteSum)) sum = INFINITY;
      reverse = static_cast<float>(BlockSum(sum, storage));
    }
  }

  // The second walk. Sums of logarithms are in bits.
  const float scale = RowScale(params, weight);
  const float psi_scale = scale * params.weight;
  const float smoothing = params.smoothing;
  const float* const prior = params.prior == nullptr ? nullptr : params.prior + first;
  const float uniform = prior != nullptr && params.prepared ? params.result->prior_scale
                                                            : 1 / static_cast<float>(classes);
  // exp(z - M)^(1/T) to the power of T, and the normalisers: see Unwarmed.
  const float unwarm = power > 1 ? FastExp2(params.temperature * warm.log_sum - plain.log_sum) : 1;
  const int local_label = static_cast<int>(label) - first;  // may be outside the part
  float psi_sum = 0, smooth_sum = 0;
  part.template Walk<kSecondUnroll>(thread, threads, [&](auto piece, int i, int step) {
    constexpr int kChunks = decltype(piece)::chunks, kWidth = decltype(piece)::width;
    float x[kChunks][kWidth], t[kChunks][kWidth], log_t[kChunks][kWidth], slope[kChunks][kWidth];
    z.Load(piece, i, step, x);
    if (kOne) teacher.Load(piece, i, step, t);
    if (kGeneral && params.num_dense > 0) {
      if (params.psi == Psi::kSquared) dense.MeanLogits(piece, i, step, t);
      if (params.psi == Psi::kMatch || params.psi == Psi::kReverse) {
        dense.Average(piece, i, step, params.divergence || params.psi == Psi::kReverse, t, log_t);
      }
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float d = x[u][j] - plain.reference;
        const float log_p = fmaf(d, rate, -warm.log_sum);
        const float p = FastExp2(log_p);
        float log_plain = log_p, p_plain = p;
        if (power != 1) {
          log_plain = fmaf(d, kLog2E, -plain.log_sum);
          p_plain = power == 0 ? FastExp2(log_plain) : Unwarmed(p, 0, power) * unwarm;
        }
        float g = scale * p_plain;
        if (smoothing > 0) {
          const float y = prior == nullptr ? uniform : uniform * __ldg(prior + i + u * step + j);
          smooth_sum += y * fmaxf(log_plain, -FLT_MAX);
          g -= scale * smoothing * y;
        }
        if (kOne) {
          float q = t[u][j] * taught.reference;
          float log_q = 0;
          if (!given) {
            log_q = taught.Log2(t[u][j], rate);
            q = FastExp2(log_q);
          } else if (params.divergence) {
            log_q = FastLog2(q);
          }
          if (params.divergence) {
            psi_sum += q * (fmaxf(log_q, -FLT_MAX) - fmaxf(log_p, -FLT_MAX));
          } else {
            psi_sum -= q * fmaxf(log_p, -FLT_MAX);
          }
          g += psi_scale * (p - q);
        }
        if (kGeneral) {
          const float bounded = fmaxf(log_p, -FLT_MAX);
          if (params.psi == Psi::kMatch) {
            float q = 0;
            if (params.num_dense > 0) {
              q = t[u][j];
              psi_sum +=
                  params.divergence ? q * (fmaxf(log_t[u][j], -FLT_MAX) - bounded) : -q * bounded;
            }
            if (params.num_topk > 0) {
              q = (static_cast<float>(params.num_dense) * q +
                   top_k.SumOfQ(i + u * step + j, log_p, p)) /
                  static_cast<float>(params.num_dense + params.num_topk);
            }
            g += psi_scale * (p - q);
          } else if (params.psi == Psi::kReverse) {
            g += psi_scale * p * static_cast<float>(kLn2) *
                 (bounded - fmaxf(log_t[u][j], -FLT_MAX) - reverse);
          } else if (params.psi == Psi::kSquared) {
            const float difference = x[u][j] - t[u][j];
            psi_sum = fmaf(difference, difference, psi_sum);
            g += psi_scale * difference;
          }
        }
        slope[u][j] = g;
      }
      if (static_cast<unsigned>(local_label - i - u * step) < static_cast<unsigned>(kWidth)) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (local_label == i + u * step + j) slope[u][j] -= scale * (1 - smoothing);
        }
      }
    }
    if (!(fabsf(psi_sum + smooth_sum) < kInfiniteSum)) {
      // Rare. The logits are the first suspects, and about to be replaced.
      for (int u = 0; u < kChunks; ++u) {
        for (int j = 0; j < kWidth; ++j) {
          if (!isfinite(x[u][j])) bad = min(bad, BadLogit(first + i + u * step + j, x[u][j]));
        }
      }
    }
    if (write) gradient.Store(piece, i, step, slope);
  });

  // What the row's losses are, and what is wrong with it.
  if (!kPlain || smoothing > 0) {
    // A logarithm of 0 that counted; squares may be large.
    const bool squares = kGeneral && params.psi == Psi::kSquared;
    if (!squares && !(fabsf(psi_sum) < kInfiniteSum)) psi_sum = INFINITY;
    if (!(fabsf(smooth_sum) < kInfiniteSum)) smooth_sum = -INFINITY;
    const double t2 = static_cast<double>(params.temperature) * params.temperature;
    double psi = kPlain ? 0 : BlockSum(psi_sum, storage);
    if (kOne) psi *= t2 * kLn2;
    if (kGeneral) {
      if (params.psi == Psi::kSquared) {
        psi /= 2 * static_cast<double>(classes);
      } else if (params.psi == Psi::kReverse) {
        psi = t2 * kLn2 * static_cast<double>(reverse);
      } else if (params.psi == Psi::kMatch) {
        psi =
            t2 * kLn2 * (params.num_dense * psi + topk_psi) / (params.num_dense + params.num_topk);
      }
    }
    result.teacher_loss = psi;
    if (smoothing > 0) result.label_loss = -kLn2 * smoothing * BlockSum(smooth_sum, storage);
  }
  if (rank == 0) {
    result.label_loss +=
        (1 - static_cast<double>(smoothing)) *
        (static_cast<double>(plain.reference) - label_logit + log(static_cast<double>(plain_sum)));
  }
  result.correct = sums.wrong == 0;
  if (__syncthreads_or(bad != kNoBadLogit)) {
    CODISTILL_SHARED(unsigned long long[32], least);  // NOLINT(runtime/int): CUDA's
    bad = WarpMin(bad);
    if (thread % 32 == 0) least[thread / 32] = bad;
    __syncthreads();
    for (int warp = 0; warp < threads / 32; ++warp) bad = min(bad, least[warp]);
    result.bad_class = static_cast<int32_t>(bad >> 32);
    result.bad_logit = __uint_as_float(static_cast<unsigned>(bad));
  }
  if (thread == 0) params.row_parts[blockIdx.x] = result;
}

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_SOFTMAX_LOSS_KERNEL_INL_H_
