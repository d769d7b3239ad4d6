// What .cu files include instead of CUDA's headers: CUDA itself or, with CODISTILL_EMULATED_CUDA,
// its emulation on the processor (cuda/testing/emulated_cuda.h, which says how to write a kernel so
// that both take it), and what a kernel needs of PTX as functions that both have.

#ifndef CODISTILL_CUDA_DEVICE_H_
#define CODISTILL_CUDA_DEVICE_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef CODISTILL_EMULATED_CUDA
#include "cuda/testing/emulated_cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Memory that the threads of a block share: CODISTILL_SHARED(float[32], partial);
template <typename T>
using CodistillSharedType = T;
#define CODISTILL_SHARED(type, name) __shared__ CodistillSharedType<type> name
#endif

namespace codistill {

#ifdef CODISTILL_EMULATED_CUDA

using emulated::DynamicShared;

inline void AsyncCopy16(void* shared, const void* global) {
  emulated::AsyncCopy(shared, global, 16);
}
inline void AsyncCommit() { emulated::AsyncCommit(); }
template <int kGroupsLeft>
void AsyncWait() {
  emulated::AsyncWait(kGroupsLeft);
}

inline unsigned ClusterRank() { return emulated::ClusterRank(); }
inline unsigned ClusterSize() { return emulated::ClusterSize(); }
inline void ClusterArrive() { emulated::ClusterArrive(); }
inline void ClusterWait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulated::ClusterWait({file, line});
}
inline void ClusterStore(float* local, unsigned rank, float value) {
  *static_cast<float*>(emulated::MapShared(local, rank)) = value;
}

inline float FastExp2(float x) { return std::exp2(x); }
inline float FastLog2(float x) { return std::log2(x); }

#else

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* DynamicShared() {
  extern __shared__ __align__(128) unsigned char codistill_dynamic_shared[];
  return codistill_dynamic_shared;
}

// Copies 16 bytes, both addresses aligned to 16, from global to shared memory past the registers
// and the first cache. Copies are grouped by AsyncCommit(); those of a thread are there, for that
// thread, after AsyncWait, for others after a barrier behind it.
__device__ __forceinline__ void AsyncCopy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
__device__ __forceinline__ void AsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most kGroupsLeft of the thread's groups, the youngest, are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void AsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Clusters of blocks (from sm_90 on; before, every block is a cluster of its own). A block may
// write to another's shared memory once that has started and until it ends: both by a barrier, of
// which every thread calls ClusterArrive() and, later, ClusterWait(). What was written before the
// first is seen after the second.
__device__ __forceinline__ unsigned ClusterRank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
__device__ __forceinline__ unsigned ClusterSize() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}
__device__ __forceinline__ void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// Writes to where `local` is in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void ClusterStore(float* local, unsigned rank, float value) {
#if __CUDA_ARCH__ >= 900
  unsigned remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(local))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  *local = value;
#endif
}

// 2^x and log2(x), by the special function unit: relative error 2^-22, denormals are 0; absolute
// error 2^-22 near 1, else relative.
__device__ __forceinline__ float FastExp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float FastLog2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), `cluster` blocks a cluster. Returns
// the error of the launch and leaves none behind.
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchClusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                           size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t LaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, Arguments&&... arguments) {
  return LaunchClusters(kernel, 1, grid, block, shared_bytes, stream,
                        std::forward<Arguments>(arguments)...);
}

}  // namespace codistill

#endif  // CODISTILL_CUDA_DEVICE_H_
