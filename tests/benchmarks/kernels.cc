// Speed of the kernels in cuda/ but for the loss, on the processor: rows of an embedding table
// taken and their gradients summed, conversions, the global norm, the k largest of a row.
//
//   kernels [--quick]
//
// Each in alternation with a memcpy that moves as many bytes - what the kernel reads and writes,
// once each - and with the obvious libtorch operation into memory that is there. On one pinned
// thread and on two. Every element of every result is checked against libtorch's or a sum in
// double before anything is timed.

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/random.h"
#include "cuda/conversion.h"
#include "cuda/embedding.h"
#include "cuda/global_norm.h"
#include "cuda/row_topk.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

// A click-through model's batch: 8,192 examples of 26 fields, a table of 16 columns.
constexpr int64_t kTableRows = 1000000, kDim = 16, kPlaces = 8192 * 26;
// Numbers to convert: a 64 MiB gradient.
constexpr int64_t kNumbers = 16 << 20;
// A weight of 4,096 channels.
constexpr int64_t kChannels = 4096, kFanIn = kNumbers / kChannels;
// A prediction server's batch.
constexpr int64_t kRows = 256, kClasses = 24000, kTopK = 64;

void Require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "kernels: %s\n", what.c_str());
  std::exit(1);
}
void Require(const absl::Status& status) { Require(status.ok(), std::string(status.message())); }

// One thing measured: the kernel, the same in libtorch, and how many bytes the kernel moves.
struct Case {
  std::string name;
  double bytes;
  std::function<void(int threads)> kernel;
  std::function<void()> torch;
  std::function<void()> check;  // of what the kernel has left
};

torch::Tensor Wrap(PrefaultedArray* array, std::vector<int64_t> shape,
                   torch::ScalarType type = torch::kFloat32) {
  return torch::from_blob(array->data(), shape, torch::TensorOptions().dtype(type));
}

void FillNormal(float* values, int64_t n, double spread, uint64_t seed) {
  RandomStream random(seed);
  // Approximately normal, and quick: a sum of uniforms.
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t bits = random.Next();
    const auto sum = static_cast<double>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                         (bits >> 32 & 0xffff) + (bits >> 48));
    values[i] = static_cast<float>(spread * (sum / 37837.0 - 2 * 65535 / 37837.0));
  }
}

// Zipf's law over the rows, roughly: as many places in every octave of them.
std::vector<uint32_t> PopularRows(int64_t n, int64_t rows, uint64_t seed) {
  RandomStream random(seed);
  std::vector<uint32_t> index(n);
  for (uint32_t& i : index) {
    const double rank = std::exp(random.Uniform() * std::log(static_cast<double>(rows)));
    i = static_cast<uint32_t>(MixBits(static_cast<uint64_t>(rank)) % static_cast<uint64_t>(rows));
  }
  return index;
}

class Embedding {
 public:
  Embedding()
      : table_(kTableRows * kDim),
        gathered_(kPlaces * kDim),
        of_torch_(kPlaces * kDim),
        index_(PopularRows(kPlaces, kTableRows, 1)),
        gradients_(kPlaces * kDim) {
    FillNormal(table_.data(), kTableRows * kDim, 1, 2);
    FillNormal(gradients_.data(), kPlaces * kDim, 1, 3);
    index64_ = torch::empty({kPlaces}, torch::kInt64);
    keys64_ = torch::empty({kPlaces}, torch::kInt64);
    // The batch's own rows, each once, in order of appearance.
    std::vector<int32_t> seen(kTableRows, -1);
    for (int64_t i = 0; i < kPlaces; ++i) {
      index64_.data_ptr<int64_t>()[i] = index_[i];
      int32_t& key = seen[index_[i]];
      if (key < 0) key = static_cast<int32_t>(num_keys_++);
      keys_.push_back(static_cast<uint32_t>(key));
      keys64_.data_ptr<int64_t>()[i] = key;
    }
    sums_ = std::make_unique<PrefaultedArray>(num_keys_ * kDim);
    torch_sums_ = std::make_unique<PrefaultedArray>(num_keys_ * kDim);
    Require(FindSegments(keys_, num_keys_, &segments_));
  }

  int64_t num_keys() const { return num_keys_; }

  std::vector<Case> Cases() {
    const double rows = static_cast<double>(kPlaces * kDim * sizeof(float));
    const double indices = static_cast<double>(kPlaces * sizeof(uint32_t));
    const double sums = static_cast<double>(num_keys_ * kDim * sizeof(float));
    Case gather = {
        "gather", 2 * rows + indices,
        [this](int threads) {
          Require(
              GatherRowsCpu(table_.data(), kTableRows, kDim, index_, gathered_.data(), threads));
        },
        [this] {
          torch::Tensor out = Wrap(&of_torch_, {kPlaces, kDim});
          torch::index_select_out(out, Wrap(&table_, {kTableRows, kDim}), 0, index64_);
        },
        [this] {
          Require(std::memcmp(gathered_.data(), of_torch_.data(), of_torch_.bytes()) == 0,
                  "gather differs");
        }};
    auto add = [this] {
      torch::Tensor out = Wrap(torch_sums_.get(), {num_keys_, kDim});
      out.zero_();
      out.index_add_(0, keys64_, Wrap(&gradients_, {kPlaces, kDim}));
    };
    auto check = [this] { CheckSums(); };
    Case sum = {"segment_sum", rows + indices + sums,
                [this](int threads) {
                  Require(SumSegmentsCpu(segments_.View(), gradients_.data(), kPlaces, kDim, false,
                                         sums_->data(), threads));
                },
                add, check};
    Case find = {"segment_sum_with_search", rows + 5 * indices + sums,
                 [this](int threads) {
                   Require(FindSegments(keys_, num_keys_, &segments_));
                   Require(SumSegmentsCpu(segments_.View(), gradients_.data(), kPlaces, kDim, false,
                                          sums_->data(), threads));
                 },
                 add, check};
    // What a worker does on one thread: places in their order, each added where it belongs.
    Case scatter = {"scatter_in_order", rows + indices + sums,
                    [this](int) {
                      float* const to = sums_->data();
                      std::fill(to, to + num_keys_ * kDim, 0.0f);
                      const float* from = gradients_.data();
                      for (const uint32_t key : keys_) {
                        float* const sum = to + key * kDim;
                        for (int64_t d = 0; d < kDim; ++d) sum[d] += from[d];
                        from += kDim;
                      }
                    },
                    add, check};
    return {gather, sum, find, scatter};
  }

 private:
  void CheckSums() const {
    std::vector<double> want(num_keys_ * kDim), magnitude(num_keys_ * kDim);
    for (int64_t i = 0; i < kPlaces * kDim; ++i) {
      const int64_t at = keys_[i / kDim] * kDim + i % kDim;
      want[at] += gradients_.data()[i];
      magnitude[at] += std::abs(gradients_.data()[i]);
    }
    for (int64_t i = 0; i < num_keys_ * kDim; ++i) {
      Require(std::abs(sums_->data()[i] - want[i]) <= 1e-12 + 1e-5 * magnitude[i],
              "segment sum differs");
    }
  }

  PrefaultedArray table_, gathered_, of_torch_;
  std::vector<uint32_t> index_, keys_;
  PrefaultedArray gradients_;
  int64_t num_keys_ = 0;
  std::unique_ptr<PrefaultedArray> sums_, torch_sums_;
  Segments segments_;
  torch::Tensor index64_, keys64_;
};

class Conversions {
 public:
  Conversions()
      : floats_(kNumbers),
        back_(kNumbers),
        torch_back_(kNumbers),
        halves_(kNumbers / 2),
        torch_halves_(kNumbers / 2),
        bytes_(kNumbers / 4),
        scales_(kChannels) {
    FillNormal(floats_.data(), kNumbers, 1, 4);
  }

  std::vector<Case> Cases() {
    std::vector<Case> cases;
    for (const auto& [format, type] : {std::pair(NumberFormat::kBfloat16, torch::kBFloat16),
                                       std::pair(NumberFormat::kFloat16, torch::kHalf)}) {
      cases.push_back(
          {absl::StrCat("to_", NameOf(format)), 6.0 * kNumbers,
           [this, format = format](int threads) {
             Require(ConvertCpu(floats_.data(), NumberFormat::kFloat32, kNumbers, halves_.data(),
                                format, threads));
           },
           [this, type = type] {
             Wrap(&torch_halves_, {kNumbers}, type).copy_(Wrap(&floats_, {kNumbers}));
           },
           [this] {
             Require(std::memcmp(halves_.data(), torch_halves_.data(), halves_.bytes()) == 0,
                     "narrowing differs");
           }});
      cases.push_back(
          {absl::StrCat("from_", NameOf(format)), 6.0 * kNumbers,
           [this, format = format](int threads) {
             Require(ConvertCpu(torch_halves_.data(), format, kNumbers, back_.data(),
                                NumberFormat::kFloat32, threads));
           },
           [this, type = type] {
             Wrap(&torch_back_, {kNumbers}).copy_(Wrap(&torch_halves_, {kNumbers}, type));
           },
           [this] {
             Require(std::memcmp(back_.data(), torch_back_.data(), back_.bytes()) == 0,
                     "widening differs");
           }});
    }
    auto* const quantized = reinterpret_cast<int8_t*>(bytes_.data());
    cases.push_back({"to_int8", 5.0 * kNumbers,
                     [this, quantized](int threads) {
                       Require(QuantizeRowsCpu(floats_.data(), kChannels, kFanIn, quantized,
                                               scales_.data(), threads));
                     },
                     [this] {
                       const torch::Tensor x = Wrap(&floats_, {kChannels, kFanIn});
                       const torch::Tensor inverse =
                           127 / x.abs().amax(1, /*keepdim=*/true).clamp_min(1e-30);
                       torch_bytes_ = x.mul(inverse).round_().to(torch::kInt8);
                     },
                     [this, quantized] {
                       Require(std::memcmp(quantized, torch_bytes_.data_ptr(), kNumbers) == 0,
                               "quantisation differs");
                     }});
    cases.push_back({"from_int8", 5.0 * kNumbers,
                     [this, quantized](int threads) {
                       Require(DequantizeRowsCpu(quantized, scales_.data(), kChannels, kFanIn,
                                                 back_.data(), threads));
                     },
                     [this, quantized] {
                       torch::Tensor out = Wrap(&torch_back_, {kChannels, kFanIn});
                       torch::mul_out(
                           out, torch::from_blob(quantized, {kChannels, kFanIn}, torch::kInt8),
                           Wrap(&scales_, {kChannels, 1}));
                     },
                     [this] {
                       Require(std::memcmp(back_.data(), torch_back_.data(), back_.bytes()) == 0,
                               "dequantisation differs");
                     }});
    return cases;
  }

 private:
  PrefaultedArray floats_, back_, torch_back_, halves_, torch_halves_, bytes_, scales_;
  torch::Tensor torch_bytes_;
};

class Norm {
 public:
  Norm() {
    int64_t total = 0;
    for (const int64_t size : ResNet50Sizes()) total += size;
    values_ = std::make_unique<PrefaultedArray>(total);
    FillNormal(values_->data(), total, 1, 5);
    float* at = values_->data();
    for (const int64_t size : ResNet50Sizes()) {
      tensors_.push_back({at, size});
      torch_tensors_.push_back(torch::from_blob(at, {size}));
      at += size;
    }
  }

  std::vector<Case> Cases() {
    // As torch.nn.utils.clip_grad_norm_ has it.
    return {{"global_norm", static_cast<double>(values_->bytes()),
             [this](int threads) { Require(GlobalNormCpu(tensors_, threads, &norm_)); },
             [this] {
               std::vector<torch::Tensor> norms;
               for (const torch::Tensor& tensor : torch_tensors_) norms.push_back(tensor.norm());
               torch_norm_ = torch::stack(norms).norm().item<double>();
             },
             [this] {
               long double want = 0;
               for (const float x : values_->span()) want += static_cast<long double>(x) * x;
               Require(norm_.first_not_finite == -1 &&
                           std::abs(norm_.sum_of_squares / static_cast<double>(want) - 1) < 1e-13,
                       "norm differs");
               Require(std::abs(torch_norm_ / norm_.norm() - 1) < 1e-3, "norm differs");
             }}};
  }

 private:
  std::unique_ptr<PrefaultedArray> values_;
  std::vector<FloatArray> tensors_;
  std::vector<torch::Tensor> torch_tensors_;
  GlobalNorm norm_;
  double torch_norm_ = 0;
};

class TopK {
 public:
  TopK() : logits_(kRows * kClasses), index_(kRows * kTopK), value_(kRows * kTopK), tail_(kRows) {
    FillNormal(logits_.data(), kRows * kClasses, 3, 6);
  }

  std::vector<Case> Cases() {
    return {{"row_topk", static_cast<double>(logits_.bytes()),
             [this](int threads) {
               RowTopKInputs inputs;
               inputs.logits = logits_.data();
               inputs.rows = kRows;
               inputs.classes = kClasses;
               inputs.k = kTopK;
               RowTopKOutputs outputs;
               outputs.index = index_.data();
               outputs.value = value_.data();
               outputs.tail = tail_.data();
               Require(RowTopKCpu(inputs, outputs, threads));
             },
             [this] {
               const torch::Tensor logits = Wrap(&logits_, {kRows, kClasses});
               std::tie(torch_value_, torch_index_) = logits.softmax(1).topk(kTopK, 1);
               torch_tail_ = 1 - torch_value_.sum(1);
             },
             [this] { Check(); }}};
  }

 private:
  void Check() const {
    for (int64_t r = 0; r < kRows; ++r) {
      const float* const z = logits_.data() + r * kClasses;
      double sum = 0, tail = 0;
      std::vector<std::pair<float, int32_t>> order;
      for (int32_t c = 0; c < kClasses; ++c) {
        sum += std::exp(static_cast<double>(z[c]));
        order.push_back({-z[c], c});
      }
      std::sort(order.begin(), order.end());
      for (int64_t i = kTopK; i < kClasses; ++i) {
        tail += std::exp(-static_cast<double>(order[i].first));
      }
      for (int64_t i = 0; i < kTopK; ++i) {
        const double want = std::exp(-static_cast<double>(order[i].first)) / sum;
        Require(index_[r * kTopK + i] == order[i].second, "the k largest differ");
        Require(std::abs(value_[r * kTopK + i] / want - 1) < 2e-6, "probability differs");
        const double torch_want = torch_value_.data_ptr<float>()[r * kTopK + i];
        Require(std::abs(torch_want / want - 1) < 1e-4, "libtorch's probability differs");
      }
      Require(std::abs(tail_[r] / (tail / sum) - 1) < 2e-6, "tail mass differs");
    }
  }

  PrefaultedArray logits_;
  std::vector<int32_t> index_;
  std::vector<float> value_, tail_;
  torch::Tensor torch_value_, torch_index_, torch_tail_;
};

// Figures of one case: seconds, and how many times as fast as the baselines.
void Measure(const Case& item, int threads, int rounds, PrefaultedArray* to, PrefaultedArray* from,
             nlohmann::ordered_json* report) {
  torch::set_num_threads(threads);
  item.torch();
  item.kernel(threads);
  item.check();
  const auto half = static_cast<size_t>(item.bytes / 2);
  auto copy = [&] {
    char* const target = reinterpret_cast<char*>(to->data());
    const char* const source = reinterpret_cast<const char*>(from->data());
    // On two threads as fast as on one, or nearly: this is the memory's own limit.
    std::memcpy(target, source, half);
  };
  std::map<std::string, std::vector<double>> seconds =
      Alternate(rounds, {{"memcpy", [&] { return Seconds(copy); }},
                         {"kernel", [&] { return Seconds([&] { item.kernel(threads); }); }},
                         {"torch", [&] { return Seconds(item.torch); }}});
  nlohmann::ordered_json figures;
  figures["gbps"] = item.bytes / Median(seconds["kernel"]) / 1e9;
  figures["memcpy_gbps"] = item.bytes / Median(seconds["memcpy"]) / 1e9;
  figures["torch_ms"] = 1e3 * Median(seconds["torch"]);
  figures["ms"] = 1e3 * Median(seconds["kernel"]);
  figures["vs_memcpy"] = MedianRatio(seconds["memcpy"], seconds["kernel"]);
  figures["vs_libtorch"] = MedianRatio(seconds["torch"], seconds["kernel"]);
  std::printf("%-24s %d thread%s  %7.3f ms  %6.1f GB/s  %5.2f of memcpy  %6.2f x libtorch\n",
              item.name.c_str(), threads, threads == 1 ? " " : "s", figures["ms"].get<double>(),
              figures["gbps"].get<double>(), figures["vs_memcpy"].get<double>(),
              figures["vs_libtorch"].get<double>());
  (*report)[absl::StrCat(item.name, "_", threads, "t")] = std::move(figures);
}

int Run(bool quick) {
  const int rounds = quick ? 3 : 10;
  torch::NoGradGuard no_gradients;
  Embedding embedding;
  Conversions conversions;
  Norm norm;
  TopK topk;
  std::vector<Case> cases = embedding.Cases();
  for (auto& more : {conversions.Cases(), norm.Cases(), topk.Cases()}) {
    cases.insert(cases.end(), more.begin(), more.end());
  }
  double most = 0;
  for (const Case& item : cases) most = std::max(most, item.bytes);
  PrefaultedArray to(static_cast<size_t>(most / 8) + 1), from(static_cast<size_t>(most / 8) + 1);

  nlohmann::ordered_json report =
      NewReport("kernels", rounds, "one thread on core 0; two unpinned");
  report["shapes"] = {
      {"embedding", {kTableRows, kDim}},     {"places", kPlaces},
      {"keys", embedding.num_keys()},        {"conversion", kNumbers},
      {"int8_rows", {kChannels, kFanIn}},    {"global_norm", "ResNet-50's 161 tensors"},
      {"row_topk", {kRows, kClasses, kTopK}}};
  report["libtorch"] = TORCH_VERSION;
  for (const int threads : {1, 2}) {
    Require(threads == 1 ? PinToCore(0) : Unpin());
    for (const Case& item : cases) {
      if (item.name == "scatter_in_order" && threads > 1) continue;
      Measure(item, threads, rounds, &to, &from, &report);
    }
  }
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RetainHeap();
  // Before OpenMP starts: its threads would otherwise be where this one is pinned.
  torch::set_num_threads(2);
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  return codistill::Run(quick);
}
