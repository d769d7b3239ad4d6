#include "cuda/testing/emulated_cuda.h"

#include <numeric>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using emulated::Order;
using ::testing::HasSubstr;

class EmulatedCudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    emulated::SetOrder(Order::kForward);
    emulated::SetDevice({});
    emulated::ClearProblem();
    cudaGetLastError();
  }
  void TearDown() override {
    emulated::SetOrder(Order::kForward);
    emulated::SetDevice({});
  }
};

// ---- What kernels may do. ----

__global__ void SumKernel(const float* values, int n, float* sums) {
  CODISTILL_SHARED(float[8], partial);
  float sum = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    sum += values[i];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
    sums[blockIdx.x] = sum;
  }
}

TEST_F(EmulatedCudaTest, SumsInBlocksAndInAnyOrder) {
  std::vector<float> values(10007);
  std::iota(values.begin(), values.end(), 0.0f);
  for (Order order : {Order::kForward, Order::kBackward, Order::kShuffled}) {
    emulated::SetOrder(order, 7);
    std::vector<float> sums(3);
    ASSERT_EQ(LaunchKernel(&SumKernel, 3, 256, 0, nullptr, values.data(), 10007, sums.data()),
              cudaSuccess)
        << emulated::Problem();
    EXPECT_NEAR(sums[0] + sums[1] + sums[2], 10006.0 * 10007 / 2, 100);
  }
}

__global__ void WarpKernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int* const mine = out + threadIdx.x * 10;
  mine[0] = __shfl_sync(0xffffffffu, lane * 10, 5);
  mine[1] = __shfl_xor_sync(0xffffffffu, lane, 3);
  mine[2] = __shfl_up_sync(0xffffffffu, lane, 2);
  mine[3] = __shfl_down_sync(0xffffffffu, lane, 2, 8);
  mine[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 2));
  mine[5] = __any_sync(0xffffffffu, lane == 31);
  mine[6] = __all_sync(0xffffffffu, lane < 31);
  mine[7] = __reduce_max_sync(0xffffffffu, lane - 40);
  mine[8] = __reduce_add_sync(0xffffffffu, lane);
  // Half a warp for itself.
  if (lane < 16) {
    mine[9] = __reduce_add_sync(0x0000ffffu, lane);
  } else {
    mine[9] = static_cast<int>(__match_any_sync(0xffff0000u, lane / 20));
  }
}

TEST_F(EmulatedCudaTest, WarpFunctionsExchangeValues) {
  std::vector<int> out(64 * 10);
  ASSERT_EQ(LaunchKernel(&WarpKernel, 1, 64, 0, nullptr, out.data()), cudaSuccess)
      << emulated::Problem();
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    const int* mine = out.data() + thread * 10;
    EXPECT_EQ(mine[0], 50);
    EXPECT_EQ(mine[1], lane ^ 3);
    EXPECT_EQ(mine[2], lane < 2 ? lane : lane - 2);
    EXPECT_EQ(mine[3], lane % 8 < 6 ? lane + 2 : lane);
    EXPECT_EQ(static_cast<unsigned>(mine[4]), 0xaaaaaaaau);
    EXPECT_EQ(mine[5], 1);
    EXPECT_EQ(mine[6], 0);
    EXPECT_EQ(mine[7], -9);
    EXPECT_EQ(mine[8], 31 * 16);
    EXPECT_EQ(static_cast<unsigned>(mine[9]), lane < 16   ? 120u
                                              : lane < 20 ? 0x000f0000u
                                                          : 0xfff00000u);
  }
}

__global__ void VoteKernel(int* out) {
  out[threadIdx.x] = __syncthreads_count(threadIdx.x < 40) * 100 +
                     __syncthreads_or(threadIdx.x == 63) * 10 + __syncthreads_and(1);
}

TEST_F(EmulatedCudaTest, BarriersVote) {
  std::vector<int> out(64);
  ASSERT_EQ(LaunchKernel(&VoteKernel, 1, 64, 0, nullptr, out.data()), cudaSuccess);
  EXPECT_THAT(out, ::testing::Each(4011));
}

// The last block to finish sums what all left.
__global__ void LastBlockKernel(int* partial, unsigned* count, int* total) {
  CODISTILL_SHARED(bool, last);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    last = atomicAdd(count, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  *total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *total += partial[i];
}

TEST_F(EmulatedCudaTest, AtomicsFindTheLastBlock) {
  emulated::SetOrder(Order::kShuffled, 3);
  std::vector<int> partial(50);
  unsigned count = 0;
  int total = 0;
  ASSERT_EQ(LaunchKernel(&LastBlockKernel, 50, 32, 0, nullptr, partial.data(), &count, &total),
            cudaSuccess);
  EXPECT_EQ(total, 50 * 51 / 2);
}

// Every block of a cluster tells the others of itself.
__global__ void ClusterKernel(float* out) {
  CODISTILL_SHARED(float[8], told);
  ClusterArrive();
  ClusterWait();
  if (threadIdx.x < ClusterSize()) {
    ClusterStore(&told[ClusterRank()], threadIdx.x, static_cast<float>(blockIdx.x));
  }
  ClusterArrive();
  ClusterWait();
  if (threadIdx.x < ClusterSize()) {
    out[blockIdx.x * ClusterSize() + threadIdx.x] = told[threadIdx.x];
  }
}

TEST_F(EmulatedCudaTest, ClustersShareMemory) {
  std::vector<float> out(12 * 4);
  ASSERT_EQ(LaunchClusters(&ClusterKernel, 4, 12, 64, 0, nullptr, out.data()), cudaSuccess)
      << emulated::Problem();
  for (int i = 0; i < 48; ++i) EXPECT_EQ(out[i], i / 16 * 4 + i % 4) << i;
  // Not before sm_90; and only whole clusters.
  EXPECT_EQ(LaunchClusters(&ClusterKernel, 4, 10, 64, 0, nullptr, out.data()),
            cudaErrorInvalidConfiguration);
  emulated::Device a100;
  a100.major = 8;
  emulated::SetDevice(a100);
  EXPECT_EQ(LaunchClusters(&ClusterKernel, 4, 12, 64, 0, nullptr, out.data()),
            cudaErrorInvalidValue);
}

struct alignas(16) Vector {
  float values[4];
};
__global__ void CopyKernel(const Vector* from, Vector* early, Vector* late) {
  auto* const shared = reinterpret_cast<Vector*>(DynamicShared());
  AsyncCopy16(shared + threadIdx.x, from + threadIdx.x);
  AsyncCommit();
  early[threadIdx.x] = shared[threadIdx.x];
  AsyncWait<0>();
  late[threadIdx.x] = shared[threadIdx.x];
}

TEST_F(EmulatedCudaTest, CopiesAreThereAfterTheWaitOnly) {
  std::vector<Vector> from(32, Vector{{1, 2, 3, 4}}), early(32), late(32);
  ASSERT_EQ(
      LaunchKernel(&CopyKernel, 1, 32, 32 * 16, nullptr, from.data(), early.data(), late.data()),
      cudaSuccess);
  for (int i = 0; i < 32; ++i) {
    EXPECT_TRUE(std::isnan(early[i].values[2]));
    EXPECT_EQ(late[i].values[2], 3);
  }
}

TEST_F(EmulatedCudaTest, HalvesRound) {
  for (int bits = 0; bits < 65536; ++bits) {
    const __half half = {static_cast<uint16_t>(bits)};
    const float value = __half2float(half);
    if (std::isnan(value)) continue;
    ASSERT_EQ(__float2half_rn(value).bits, bits);
  }
  // Ties go to the even one; beyond the largest is infinite.
  EXPECT_EQ(__half2float(__float2half_rn(2049)), 2048);
  EXPECT_EQ(__half2float(__float2half_rn(2051)), 2052);
  EXPECT_EQ(__half2float(__float2half_rn(65519)), 65504);
  EXPECT_TRUE(std::isinf(__half2float(__float2half_rn(65520))));
  EXPECT_EQ(__half2float(__float2half_rn(std::ldexp(3.0f, -25))), std::ldexp(1.0f, -23));
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(257)), 256);
  EXPECT_EQ(__bfloat162float(__float2bfloat16_rn(259)), 260);
}

// ---- What it finds. ----

__global__ void DivergentBarrierKernel() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void TwoBarriersKernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void DivergentShuffleKernel(int* out) {
  if (threadIdx.x % 2 == 0) *out = __shfl_sync(0xffffffffu, 1, 0);
}
__global__ void ForeignLaneKernel(int* out) {
  if (threadIdx.x < 16) *out = __shfl_xor_sync(0x0000ffffu, 1, 16);
}
__global__ void ForgottenCopyKernel(const Vector* from) {
  AsyncCopy16(DynamicShared() + 16 * threadIdx.x, from + threadIdx.x);
  AsyncCommit();
}
__global__ void LonelyClusterKernel() {
  ClusterArrive();
  if (ClusterRank() == 0) return;
  ClusterWait();
  if (ClusterRank() == 1) __syncthreads();
}
__global__ void EarlyExitKernel() {
  CODISTILL_SHARED(float, value);
  if (ClusterRank() == 1) return;
  __syncthreads();
  ClusterStore(&value, 1, 1);
}

TEST_F(EmulatedCudaTest, FindsThreadsThatMissABarrier) {
  EXPECT_EQ(LaunchKernel(&DivergentBarrierKernel, 2, 64, 0, nullptr), cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("40 for the barrier at "));
  EXPECT_THAT(emulated::Problem(), HasSubstr("emulated_cuda_test.cc:"));
  EXPECT_THAT(emulated::Problem(), HasSubstr("24 have left the kernel"));
  EXPECT_THAT(std::string(cudaGetErrorString(cudaErrorLaunchFailure)), HasSubstr("24 have left"));
}

TEST_F(EmulatedCudaTest, FindsThreadsAtDifferentBarriers) {
  EXPECT_EQ(LaunchKernel(&TwoBarriersKernel, 1, 64, 0, nullptr), cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("others at "));
}

TEST_F(EmulatedCudaTest, FindsLanesThatMissAShuffle) {
  int out = 0;
  EXPECT_EQ(LaunchKernel(&DivergentShuffleKernel, 1, 32, 0, nullptr, &out), cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("16 for lanes of its warp"));
}

TEST_F(EmulatedCudaTest, FindsShufflesFromOutsideTheMask) {
  int out = 0;
  EXPECT_EQ(LaunchKernel(&ForeignLaneKernel, 1, 32, 0, nullptr, &out), cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("reads lane 16, which is not in the mask"));
}

TEST_F(EmulatedCudaTest, FindsCopiesNobodyWaitsFor) {
  std::vector<Vector> from(32);
  EXPECT_EQ(LaunchKernel(&ForgottenCopyKernel, 1, 32, 32 * 16, nullptr, from.data()),
            cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("has not waited for"));
}

TEST_F(EmulatedCudaTest, GoesOnAfterAProblem) {
  EXPECT_EQ(LaunchKernel(&LonelyClusterKernel, 1, 32, 0, nullptr), cudaSuccess)
      << emulated::Problem();
  EXPECT_EQ(LaunchClusters(&EarlyExitKernel, 2, 2, 32, 0, nullptr), cudaErrorLaunchFailure);
  EXPECT_THAT(emulated::Problem(), HasSubstr("whose threads are leaving"));
  std::vector<int> out(64);
  EXPECT_EQ(LaunchKernel(&VoteKernel, 1, 64, 0, nullptr, out.data()), cudaSuccess);
}

// Thread 31 reads what thread 0 writes, without a barrier between.
__global__ void RaceKernel(int* out) {
  CODISTILL_SHARED(int, value);
  if (threadIdx.x == 0) value = 1;
  if (threadIdx.x == 31) *out = value;
}

TEST_F(EmulatedCudaTest, AnotherOrderShowsAMissingBarrier) {
  int out = 0;
  ASSERT_EQ(LaunchKernel(&RaceKernel, 1, 32, 0, nullptr, &out), cudaSuccess);
  EXPECT_EQ(out, 1);
  emulated::SetOrder(Order::kBackward);
  ASSERT_EQ(LaunchKernel(&RaceKernel, 1, 32, 0, nullptr, &out), cudaSuccess);
  EXPECT_EQ(out, -1);  // nothing has been written there
}

#if defined(__SANITIZE_ADDRESS__)
__global__ void OverrunKernel(int* out) {
  CODISTILL_SHARED(int[32], values);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + *out];
}

TEST_F(EmulatedCudaTest, AddressSanitizerSeesSharedAndDeviceMemory) {
  void* out = nullptr;
  ASSERT_EQ(cudaMalloc(&out, 32 * sizeof(int)), cudaSuccess);
  *static_cast<int*>(out) = 1;
  EXPECT_DEATH(LaunchKernel(&OverrunKernel, 1, 32, 0, nullptr, static_cast<int*>(out)),
               "heap-buffer-overflow|out of bounds");
  *static_cast<int*>(out) = 0;
  EXPECT_DEATH(LaunchKernel(&OverrunKernel, 1, 64, 0, nullptr, static_cast<int*>(out)),
               "heap-buffer-overflow|out of bounds");
  cudaFree(out);
}
#endif

__global__ void NothingKernel() {}

TEST_F(EmulatedCudaTest, RefusesLaunchesThatADeviceRefuses) {
  EXPECT_EQ(LaunchKernel(&NothingKernel, 1, 1025, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(LaunchKernel(&NothingKernel, 0, 32, 0, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(LaunchKernel(&NothingKernel, 1, 32, 100000, nullptr), cudaErrorInvalidConfiguration);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  ASSERT_EQ(
      cudaFuncSetAttribute(&NothingKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000),
      cudaSuccess);
  EXPECT_EQ(LaunchKernel(&NothingKernel, 1, 32, 100000, nullptr), cudaSuccess);
  EXPECT_EQ(
      cudaFuncSetAttribute(&NothingKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 250000),
      cudaErrorInvalidValue);
}

}  // namespace
}  // namespace codistill
