// What the benchmarks on CUDA devices have in common: memory, time by the device's clock, and what
// a report says of the device.

#ifndef CODISTILL_TESTS_BENCHMARKS_GPU_HARNESS_H_
#define CODISTILL_TESTS_BENCHMARKS_GPU_HARNESS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/benchmarks/harness.h"

namespace codistill {

// Ends the program, saying why.
inline void Require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}
inline void Require(const absl::Status& status) {
  Require(status.ok(), std::string(status.message()));
}
inline void Require(cudaError_t error) { Require(error == cudaSuccess, cudaGetErrorString(error)); }

// An array in device memory, filled with 0xff.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(size_t n) : n_(n) {
    void* data = nullptr;
    Require(cudaMalloc(&data, std::max<size_t>(16, n * sizeof(T))));
    data_ = static_cast<T*>(data);
    Require(cudaMemset(data_, 0xff, n * sizeof(T)));
  }
  explicit OnDevice(const std::vector<T>& host) : OnDevice(host.size()) {
    Require(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;

  T* get() const { return data_; }
  size_t size() const { return n_; }
  std::vector<T> Fetch() const {
    std::vector<T> host(n_);
    Require(cudaMemcpy(host.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  const size_t n_;
  T* data_ = nullptr;
};

// A stream, and the time that what is queued on it takes.
class GpuTimer {
 public:
  GpuTimer() {
    Require(cudaStreamCreate(&stream_));
    Require(cudaEventCreate(&begin_));
    Require(cudaEventCreate(&end_));
  }
  ~GpuTimer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  GpuTimer(const GpuTimer&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Seconds a call of `body`, which queues work on the stream: over enough of them that the clock's
  // grain and the launches do not count.
  double Seconds(const std::function<void()>& body, int calls = 10) {
    Require(cudaEventRecord(begin_, stream_));
    for (int i = 0; i < calls; ++i) body();
    Require(cudaEventRecord(end_, stream_));
    Require(cudaEventSynchronize(end_));
    float milliseconds = 0;
    Require(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds / 1e3 / calls;
  }

  // Times `kernel`, which has run and been checked, in alternation with a copy on the device that
  // moves as many bytes, read and written together.
  nlohmann::ordered_json AgainstCopy(int rounds, double bytes,
                                     const std::function<void()>& kernel) {
    const auto half = static_cast<size_t>(bytes / 2);
    const OnDevice<char> from(half), to(half);
    const auto copy = [&] {
      Require(cudaMemcpyAsync(to.get(), from.get(), half, cudaMemcpyDeviceToDevice, stream_));
    };
    copy();
    kernel();
    std::map<std::string, std::vector<double>> seconds = Alternate(
        rounds,
        {{"copy", [&] { return Seconds(copy); }}, {"kernel", [&] { return Seconds(kernel); }}});
    nlohmann::ordered_json figures;
    figures["us"] = 1e6 * Median(seconds["kernel"]);
    figures["gbps"] = bytes / Median(seconds["kernel"]) / 1e9;
    figures["copy_gbps"] = bytes / Median(seconds["copy"]) / 1e9;
    figures["vs_copy"] = MedianRatio(seconds["copy"], seconds["kernel"]);
    return figures;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Whether there is a device; says so on stderr where there is none.
inline bool HasDevice(const char* program) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::fprintf(stderr, "%s: no CUDA device\n", program);
  return false;
}

// NewReport with the device's properties.
inline nlohmann::ordered_json NewGpuReport(const std::string& name, int rounds) {
  nlohmann::ordered_json report = NewReport(name, rounds, "none");
  cudaDeviceProp device = {};
  Require(cudaGetDeviceProperties(&device, 0));
  report["device"] = {{"name", device.name},
                      {"compute", absl::StrCat(device.major, ".", device.minor)},
                      {"multiprocessors", device.multiProcessorCount},
                      {"l2_bytes", device.l2CacheSize}};
  return report;
}

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_GPU_HARNESS_H_
