// What the tests of kernels have in common, on a device as on its emulation (emulated_cuda.h).

#ifndef CODISTILL_CUDA_TESTING_DEVICE_ARRAY_H_
#define CODISTILL_CUDA_TESTING_DEVICE_ARRAY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#ifdef CODISTILL_EMULATED_CUDA
#include "cuda/testing/emulated_cuda.h"
#else
#include <cuda_runtime.h>
#endif

#include "gtest/gtest.h"

namespace codistill {

// An array on the device, `offset` elements behind an address that suits every vector.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n, size_t offset = 0) : n_(n), offset_(offset) {
    EXPECT_EQ(cudaMalloc(&data_, (n + offset) * sizeof(T) + 16), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0xff, (n + offset) * sizeof(T) + 16), cudaSuccess);
  }
  explicit DeviceArray(const std::vector<T>& host, size_t offset = 0)
      : DeviceArray(host.size(), offset) {
    EXPECT_EQ(cudaMemcpy(get(), host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray&& other) noexcept
      : n_(other.n_), offset_(other.offset_), data_(other.data_) {
    other.data_ = nullptr;
  }
  DeviceArray(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_) + offset_; }
  std::vector<T> Fetch() const {
    std::vector<T> host(n_);
    EXPECT_EQ(cudaMemcpy(host.data(), get(), n_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return host;
  }
  // Whether the 16 bytes behind the array are as they were.
  bool NothingBehind() const {
    unsigned char behind[16];
    EXPECT_EQ(cudaMemcpy(behind, get() + n_, sizeof(behind), cudaMemcpyDeviceToHost), cudaSuccess);
    for (const unsigned char byte : behind) {
      if (byte != 0xff) return false;
    }
    return true;
  }

 private:
  size_t n_, offset_;
  void* data_ = nullptr;
};

// Device memory for a workspace.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes) {}
  void* get() const { return bytes_.get(); }

 private:
  DeviceArray<unsigned char> bytes_;
};

// Skips where there is no device.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      cudaGetLastError();  // forget the error of the question
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

// Runs `body` once on a device; emulated, with threads in several orders, which kernels must not
// depend on.
inline void InEveryOrder(const std::function<void()>& body) {
#ifdef CODISTILL_EMULATED_CUDA
  for (const auto order :
       {emulated::Order::kForward, emulated::Order::kBackward, emulated::Order::kShuffled}) {
    emulated::SetOrder(order);
    body();
    EXPECT_EQ(emulated::Problem(), "");
    emulated::ClearProblem();
  }
  emulated::SetOrder(emulated::Order::kForward);
#else
  body();
#endif
}

}  // namespace codistill

#endif  // CODISTILL_CUDA_TESTING_DEVICE_ARRAY_H_
