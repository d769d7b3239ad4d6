#include "tests/benchmarks/harness.h"

#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/utsname.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace codistill {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

// Runs `body(begin, end)` over [0, n) on so many threads, each on a contiguous part.
void InParts(size_t n, int threads, const std::function<void(size_t, size_t)>& body) {
  if (threads <= 1) {
    body(0, n);
    return;
  }
  std::vector<std::thread> others;
  // Parts begin on cache lines.
  const size_t part = (n / threads + 15) / 16 * 16;
  for (int t = 1; t < threads; ++t) {
    others.emplace_back(body, std::min(n, part * t),
                        t + 1 == threads ? n : std::min(n, part * (t + 1)));
  }
  body(0, std::min(n, part));
  for (std::thread& thread : others) thread.join();
}

absl::Status SetAffinity(const cpu_set_t& set, absl::string_view what) {
  if (const int error = pthread_setaffinity_np(pthread_self(), sizeof(set), &set); error != 0) {
    return absl::InternalError(absl::StrCat(what, ": ", strerror(error)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status PinToCore(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  return SetAffinity(set, absl::StrCat("core ", core));
}

absl::Status Unpin() {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int core = 0; core < CPU_SETSIZE; ++core) CPU_SET(core, &set);
  return SetAffinity(set, "all cores");
}

void RetainHeap() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

PrefaultedArray::PrefaultedArray(size_t size) : size_(size) {
  mapped_ = (size * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  void* const memory =
      mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "no memory for %zu bytes\n", mapped_);
    std::abort();
  }
  madvise(memory, mapped_, MADV_HUGEPAGE);
  data_ = static_cast<float*>(memory);
  std::memset(memory, 0, mapped_);
}

PrefaultedArray::~PrefaultedArray() { munmap(data_, mapped_); }

double Seconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double MemcpyGbps(PrefaultedArray* to, const PrefaultedArray& from, int threads) {
  const size_t n = std::min(to->size(), from.size());
  float* const target = to->data();
  const float* const source = from.data();
  const double seconds = Seconds([&] {
    InParts(n, threads, [&](size_t begin, size_t end) {
      std::memcpy(target + begin, source + begin, (end - begin) * sizeof(float));
    });
  });
  return 2.0 * static_cast<double>(n * sizeof(float)) / seconds / 1e9;
}

double ScaleInPlaceGbps(PrefaultedArray* x, int threads) {
  float* const data = x->data();
  // The compiler must not know it, nor may the values grow or vanish over many rounds.
  static volatile float factors[2] = {1.0009765625f, 1.0f / 1.0009765625f};
  static int turn = 0;
  const float c = factors[turn++ % 2];
  const double seconds = Seconds([&] {
    InParts(x->size(), threads, [=](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) data[i] *= c;
    });
  });
  return 2.0 * static_cast<double>(x->bytes()) / seconds / 1e9;
}

double Median(std::vector<double> samples) {
  if (samples.empty()) return std::nan("");
  std::sort(samples.begin(), samples.end());
  const size_t half = samples.size() / 2;
  return samples.size() % 2 == 1 ? samples[half] : (samples[half - 1] + samples[half]) / 2;
}

double Percentile(std::vector<double> samples, double p) {
  if (samples.empty()) return std::nan("");
  std::sort(samples.begin(), samples.end());
  const double rank = std::ceil(p * static_cast<double>(samples.size()));
  const size_t index = rank < 1 ? 0 : static_cast<size_t>(rank) - 1;
  return samples[std::min(index, samples.size() - 1)];
}

std::map<std::string, std::vector<double>> Alternate(int rounds,
                                                     const std::vector<Contestant>& contestants) {
  std::map<std::string, std::vector<double>> results;
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < contestants.size(); ++i) {
      const Contestant& next = contestants[(round + i) % contestants.size()];
      results[next.name].push_back(next.body());
    }
  }
  return results;
}

double MedianRatio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) ratios.push_back(a[i] / b[i]);
  return Median(std::move(ratios));
}

nlohmann::ordered_json NewReport(const std::string& name, int rounds, const std::string& pinning) {
  nlohmann::ordered_json report;
  report["benchmark"] = name;
  report["rounds"] = rounds;
  report["pinning"] = pinning;
  utsname kernel{};
  uname(&kernel);
  report["machine"] = {{"processor", ProcessorName()},
                       {"cores", std::thread::hardware_concurrency()},
                       {"kernel", kernel.release}};
  return report;
}

void PrintReport(const nlohmann::ordered_json& report) {
  std::printf("%s\n", report.dump().c_str());
  std::fflush(stdout);
}

std::vector<int64_t> ResNet50Sizes() {
  std::vector<int64_t> sizes = {64 * 3 * 7 * 7, 64, 64};  // first convolution and its norm
  const auto convolution = [&](int64_t out, int64_t in, int64_t kernel) {
    sizes.push_back(out * in * kernel * kernel);
    sizes.push_back(out);  // scale and shift of the batch norm
    sizes.push_back(out);
  };
  int64_t in = 64;
  const std::pair<int, int64_t> stages[] = {{3, 64}, {4, 128}, {6, 256}, {3, 512}};
  for (const auto& [blocks, width] : stages) {
    for (int block = 0; block < blocks; ++block) {
      convolution(width, in, 1);
      convolution(width, width, 3);
      convolution(4 * width, width, 1);
      if (block == 0) convolution(4 * width, in, 1);
      in = 4 * width;
    }
  }
  sizes.push_back(1000 * 2048);
  sizes.push_back(1000);
  return sizes;
}

std::vector<int64_t> ResNet50LikeSizes(int64_t total) {
  const std::vector<int64_t> one = ResNet50Sizes();
  std::vector<int64_t> sizes;
  for (size_t i = 0; total > 0; ++i) {
    sizes.push_back(std::min(total, one[i % one.size()]));
    total -= sizes.back();
  }
  return sizes;
}

}  // namespace codistill
