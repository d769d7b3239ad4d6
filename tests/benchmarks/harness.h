#ifndef CODISTILL_TESTS_BENCHMARKS_HARNESS_H_
#define CODISTILL_TESTS_BENCHMARKS_HARNESS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"

// What programs that measure have in common: threads on cores, memory that is there, rounds in
// alternation, the limits of the machine measured in the same run, and a JSON object at the end.
namespace codistill {

// Puts the calling thread, and those it starts from now on, on one core. Unpinned threads have
// landed on one core and waited for each other. INTERNAL names the core.
absl::Status PinToCore(int core);
// Undoes it: any core will do again.
absl::Status Unpin();

// malloc keeps what it has been given: without it every large array is faulted in anew each round,
// which costs more than what is measured. Call first thing in main.
void RetainHeap();

// Floats on a 64-byte boundary, huge pages asked for, every page touched.
class PrefaultedArray {
 public:
  explicit PrefaultedArray(size_t size);
  ~PrefaultedArray();
  PrefaultedArray(const PrefaultedArray&) = delete;
  PrefaultedArray& operator=(const PrefaultedArray&) = delete;

  float* data() { return data_; }
  const float* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(float); }
  absl::Span<float> span() { return absl::MakeSpan(data_, size_); }

 private:
  float* data_ = nullptr;
  const size_t size_;
  size_t mapped_ = 0;
};

// Wall-clock seconds of `body`.
double Seconds(const std::function<void()>& body);

// The limits of this memory, once over, in 1e9 bytes a second counting what is read and what is
// written. `threads` share the array; on one thread the calling one does it all.
double MemcpyGbps(PrefaultedArray* to, const PrefaultedArray& from, int threads = 1);
double ScaleInPlaceGbps(PrefaultedArray* x, int threads = 1);  // x *= c

double Median(std::vector<double> samples);
// `p` in [0, 1], nearest rank.
double Percentile(std::vector<double> samples, double p);

// Runs every body once a round, in an order that moves on by one each round, so that nobody is
// always first after somebody else. Returns what the bodies returned, by name, in order of rounds.
struct Contestant {
  std::string name;
  std::function<double()> body;
};
std::map<std::string, std::vector<double>> Alternate(int rounds,
                                                     const std::vector<Contestant>& contestants);

// Median over rounds of a[i] / b[i].
double MedianRatio(const std::vector<double>& a, const std::vector<double>& b);

// {"benchmark": name, "rounds": ..., "pinning": ..., "machine": {processor, cores, kernel}}: what
// every result says of itself. The figures are added by the program.
nlohmann::ordered_json NewReport(const std::string& name, int rounds, const std::string& pinning);

// One line, the last of the output.
void PrintReport(const nlohmann::ordered_json& report);

// A list of tensors like ResNet-50's (He et al. 2016): sizes in elements of its 161 parameters,
// 25.6 M in all, repeated and cut so that the sum is `total` elements.
std::vector<int64_t> ResNet50Sizes();
std::vector<int64_t> ResNet50LikeSizes(int64_t total);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_HARNESS_H_
