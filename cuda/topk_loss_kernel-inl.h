// The softmax kernel's part for teachers that name their most likely classes only (loss.h). For .cu
// files.
//
// The classes that any teacher names in a row are a bitmap in shared memory; a class's place among
// them, by counting bits, is its place in a table of what teachers give it. So the second walk
// meets every class once, named or not, and nothing of the size of the vocabulary is in device
// memory.

#ifndef CODISTILL_CUDA_TOPK_LOSS_KERNEL_INL_H_
#define CODISTILL_CUDA_TOPK_LOSS_KERNEL_INL_H_

#include <cfloat>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/loss_params.h"
#include "cuda/loss_rows-inl.h"

namespace codistill::internal {

// A row's top-k teachers, for the threads of one block together. With p the student's probabilities
// at temperature T, q and t (the tail) those of a teacher, P what p gives the classes that it does
// not name, the teacher's distribution is q_c for a class named and t p_c / P for another.
class TopKRow {
 public:
  // Bytes of dynamic shared memory: three words per 32 classes.
  static __host__ __device__ int BitmapBytes(int classes) { return 3 * 4 * ((classes + 31) / 32); }

  // Checks the teachers' arrays and builds the table; whether they are as they must be.
  __device__ bool Prepare(const LossParams& params, int64_t row, double* storage) {
    params_ = &params;
    row_ = row;
    words_ = (params.classes + 31) / 32;
    seen_ = reinterpret_cast<unsigned*>(DynamicShared() + params.bitmaps_at);
    named_ = seen_ + words_;
    before_ = named_ + words_;
    table_ = params.named + row * params.named_per_row;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

    __syncthreads();
    for (int w = thread; w < words_; w += threads) named_[w] = 0;
    bool wrong = false;
    for (int t = 0; t < params.num_topk; ++t) {
      const TopKParams& teacher = params.topk[t];
      const double mass = Mark(t, &wrong);
      const float tail = teacher.tail == nullptr ? 0 : teacher.tail[row];
      const double all = BlockSum(mass, storage) + tail;
      wrong = wrong || !(tail >= 0 && isfinite(tail)) || !(fabs(all - 1) <= kCudaMassTolerance);
      for (int w = thread; w < words_; w += threads) named_[w] |= seen_[w];
      if (thread == 0)
        states()[t] = {static_cast<float>(1 / all), static_cast<float>(tail / all), 0};
    }
    if (__syncthreads_or(wrong)) return false;
    CountBefore();
    for (int w = thread; w < words_; w += threads) {
      unsigned place = before_[w];
      for (unsigned bits = named_[w]; bits != 0; bits &= bits - 1) {
        table_[place++] = {32 * w + __ffs(static_cast<int>(bits)) - 1, 0, 0};
      }
    }
    __syncthreads();
    return true;
  }

  // With log_p(c) the log2 of what the student gives a class, and log_rest(leave_out) that of all
  // classes but those for which leave_out(c), which all threads call together. Returns the sum of
  // the teachers' psi / T^2, in bits.
  template <typename LogP, typename LogRest>
  __device__ double TakeStudent(double* storage, LogP log_p, LogRest log_rest) {
    const LossParams& params = *params_;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    double psi = 0;
    for (int t = 0; t < params.num_topk; ++t) {
      const TopKParams& teacher = params.topk[t];
      bool ignored = false;
      Mark(t, &ignored);
      const float normalise = states()[t].normalise, tail = states()[t].tail;
      double named_p = 0, cross = 0;
      for (int64_t i = thread; i < teacher.k; i += threads) {
        const int c = teacher.index[row_ * teacher.k + i];
        const float q = teacher.value[row_ * teacher.k + i] * normalise;
        const float log = log_p(c);
        named_p += FastExp2(log);
        const float log_q = params.divergence ? fmaxf(log2f(q), -FLT_MAX) : 0;
        cross += static_cast<double>(q * (log_q - fmaxf(log, -FLT_MAX)));
        table_[Place(c)].q += q;
      }
      psi += BlockSum(cross, storage);
      const double others = 1 - BlockSum(named_p, storage);
      float log_others = 0;
      if (tail > 0) {
        const unsigned* const seen = seen_;
        // Exact where the others have little.
        log_others = others > 0.25
                         ? log2f(static_cast<float>(others))
                         : log_rest([seen](int c) { return (seen[c >> 5] >> (c & 31) & 1) != 0; });
        psi += static_cast<double>(tail) *
               ((params.divergence ? log2f(tail) : 0) - static_cast<double>(log_others));
      }
      if (thread == 0) states()[t].log_others = log_others;
      // Classes that others name have a share in this teacher's tail.
      const int count = static_cast<int>(before_[words_ - 1]) + __popc(named_[words_ - 1]);
      for (int place = thread; place < count; place += threads) {
        NamedClass& named = table_[place];
        if ((seen_[named.index >> 5] >> (named.index & 31) & 1) == 0) {
          named.share += tail * FastExp2(log_p(named.index) - log_others);
        }
      }
      __syncthreads();
    }
    extreme_ = false;
    ratio_ = 0;
    for (int t = 0; t < params.num_topk; ++t) {
      const TopKState state = states()[t];
      if (!(state.tail > 0)) continue;
      extreme_ = extreme_ || state.log_others < -60;
      ratio_ += state.tail * FastExp2(-state.log_others);
    }
    return psi;
  }

  // Sum over the teachers of what they give class c, to which the student gives p.
  __device__ __forceinline__ float SumOfQ(int c, float log_p, float p) const {
    if ((named_[c >> 5] >> (c & 31) & 1) != 0) {
      const NamedClass named = table_[Place(c)];
      return named.q + named.share;
    }
    if (!extreme_) return ratio_ * p;
    // The student gives the tail so little that p vanishes and the ratio overflows.
    float sum = 0;
    for (int t = 0; t < params_->num_topk; ++t) {
      const TopKState state = states()[t];
      if (state.tail > 0) sum += state.tail * FastExp2(log_p - state.log_others);
    }
    return sum;
  }

 private:
  struct TopKState {
    float normalise;   // 1 / (sum of values and tail)
    float tail;        // t
    float log_others;  // log2 P
  };
  using States = TopKState[kMaxTeachers];

  static __device__ __forceinline__ TopKState* states() {
    CODISTILL_SHARED(States, states);
    return states;
  }

  // Makes seen_ the classes that teacher t names, for all threads after the next barrier. Returns
  // this thread's part of the values' sum; *wrong where an index or value is.
  __device__ double Mark(int t, bool* wrong) {
    const TopKParams& teacher = params_->topk[t];
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    __syncthreads();
    for (int w = thread; w < words_; w += threads) seen_[w] = 0;
    __syncthreads();
    double mass = 0;
    for (int64_t i = thread; i < teacher.k; i += threads) {
      const int32_t c = teacher.index[row_ * teacher.k + i];
      const float value = teacher.value[row_ * teacher.k + i];
      mass += value;
      if (c < 0 || c >= params_->classes || !(value >= 0 && isfinite(value))) {
        *wrong = true;
        continue;
      }
      const unsigned bit = 1u << (c & 31);
      if ((atomicOr(&seen_[c >> 5], bit) & bit) != 0) *wrong = true;
    }
    __syncthreads();
    return mass;
  }

  // Classes named before each word's.
  __device__ void CountBefore() {
    CODISTILL_SHARED(unsigned[32], of_warps);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int lane = thread % 32, warp = thread / 32;
    const int each = (words_ + threads - 1) / threads;
    const int begin = min(thread * each, words_), end = min(begin + each, words_);
    unsigned mine = 0;
    for (int w = begin; w < end; ++w) mine += __popc(named_[w]);
    unsigned up_to = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
      const unsigned lower = __shfl_up_sync(kAllLanes, up_to, offset);
      if (lane >= offset) up_to += lower;
    }
    if (lane == 31) of_warps[warp] = up_to;
    __syncthreads();
    unsigned count = up_to - mine;
    for (int w = 0; w < warp; ++w) count += of_warps[w];
    for (int w = begin; w < end; ++w) {
      before_[w] = count;
      count += __popc(named_[w]);
    }
    __syncthreads();
  }

  __device__ __forceinline__ int Place(int c) const {
    return static_cast<int>(before_[c >> 5]) + __popc(named_[c >> 5] & ((1u << (c & 31)) - 1));
  }

  const LossParams* params_ = nullptr;
  int64_t row_ = 0;
  int words_ = 0;
  unsigned* seen_ = nullptr;    // the classes of one teacher
  unsigned* named_ = nullptr;   // those of any
  unsigned* before_ = nullptr;  // by word, the classes named in words before
  NamedClass* table_ = nullptr;
  bool extreme_ = false;
  float ratio_ = 0;  // sum over the teachers of t / P
};

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_TOPK_LOSS_KERNEL_INL_H_
