// Speed of the codistillation loss and its gradient, next to a memcpy that moves as many bytes.
//
//   loss_benchmark --benchmark_enable_random_interleaving=true --benchmark_repetitions=10
//
// The shape is that of a language model's batch: 2,048 positions, 24,000 word pieces, dense
// teacher, or one that names 64 of them. Each configuration checks every element of its result
// before it is timed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "common/base/random.h"
#include "cuda/loss.h"

namespace codistill {
namespace {

constexpr int64_t kRows = 2048, kClasses = 24000, kElements = kRows * kClasses;
constexpr int64_t kTopK = 64;

struct Data {
  std::vector<float> logits, teacher, gradient;
  std::vector<int64_t> labels;
  DenseTeacher dense;
  // The teacher's likeliest classes.
  std::vector<int32_t> index;
  std::vector<float> value, tail;
  TopKTeacher top_k;

  Data() : logits(kElements), teacher(kElements), gradient(kElements), labels(kRows) {
    // Approximately normal, and quick: a sum of uniforms.
    RandomStream random(1);
    for (std::vector<float>* values : {&logits, &teacher}) {
      for (float& value : *values) {
        const uint64_t bits = random.Next();
        value = static_cast<float>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) +
                                   (bits >> 48)) /
                    16384.0f -
                8.0f;
      }
    }
    for (int64_t& label : labels) label = static_cast<int64_t>(random.Below(kClasses));
    dense.values = teacher.data();
    for (int64_t r = 0; r < kRows; ++r) AddTopK(&teacher[r * kClasses]);
    top_k = {index.data(), value.data(), tail.data(), kTopK};
  }

  void AddTopK(const float* t) {
    std::vector<int32_t> order(kClasses);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + kTopK, order.end(),
                      [t](int32_t a, int32_t b) { return t[a] > t[b]; });
    double sum = 0, named = 0;
    for (int64_t c = 0; c < kClasses; ++c) sum += std::exp(static_cast<double>(t[c]));
    for (int64_t i = 0; i < kTopK; ++i) {
      index.push_back(order[i]);
      value.push_back(static_cast<float>(std::exp(static_cast<double>(t[order[i]])) / sum));
      named += value.back();
    }
    tail.push_back(static_cast<float>(1 - named));
  }

  LossInputs Inputs(bool teach) const {
    LossInputs inputs;
    inputs.rows = kRows;
    inputs.classes = kClasses;
    inputs.logits = logits.data();
    inputs.labels = labels.data();
    if (teach) {
      inputs.teachers = absl::MakeConstSpan(&dense, 1);
      inputs.teacher_weight = 1;
    }
    return inputs;
  }
};

Data& SharedData() {
  static Data* const data = new Data;
  return *data;
}

// Whether gradient and loss are right everywhere; plain code in double precision.
std::string Check(const Data& data, bool teach, const LossOutputs& outputs) {
  auto normaliser = [](const float* x) {
    double sum = 0;
    for (int64_t c = 0; c < kClasses; ++c) sum += std::exp(static_cast<double>(x[c]));
    return sum;
  };
  double loss = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const float* z = &data.logits[r * kClasses];
    const float* t = &data.teacher[r * kClasses];
    const double z_sum = normaliser(z), t_sum = teach ? normaliser(t) : 1;
    double mean_logit = 0;
    for (int64_t c = 0; c < kClasses; ++c) {
      const double p = std::exp(static_cast<double>(z[c])) / z_sum;
      const double q = teach ? std::exp(static_cast<double>(t[c])) / t_sum : 0;
      mean_logit += q * z[c];
      const double expected = ((teach ? 2 * p - q : p) - (c == data.labels[r] ? 1 : 0)) / kRows;
      const double actual = data.gradient[r * kClasses + c];
      if (!(std::abs(actual - expected) <= 1e-10 + 1e-5 * std::abs(expected))) {
        return "gradient differs in row " + std::to_string(r) + " class " + std::to_string(c);
      }
    }
    loss += std::log(z_sum) - z[data.labels[r]];
    if (teach) loss += std::log(z_sum) - mean_logit;
  }
  const double actual = outputs.sums.label_loss_sum + outputs.sums.teacher_loss_sum;
  return std::abs(actual - loss) < 1e-6 * loss ? "" : "loss differs";
}

void BM_Loss(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  const bool teach = state.range(1) != 0;
  Data& data = SharedData();
  const LossInputs inputs = data.Inputs(teach);
  LossOutputs outputs;
  outputs.gradient = data.gradient.data();
  if (!ComputeLossCpu(LossOptions(), inputs, &outputs, threads).ok()) {
    state.SkipWithError("the loss failed");
    return;
  }
  const std::string problem = Check(data, teach, outputs);
  if (!problem.empty()) {
    state.SkipWithError(problem.c_str());
    return;
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(ComputeLossCpu(LossOptions(), inputs, &outputs, threads).ok());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * (teach ? 3 : 2) * kElements * sizeof(float));
}
BENCHMARK(BM_Loss)
    ->ArgNames({"threads", "teacher"})
    ->Args({1, 1})
    ->Args({2, 1})
    ->Args({1, 0})
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// As Check, for the teacher that names kTopK classes.
std::string CheckTopK(const Data& data, const LossOutputs& outputs) {
  double loss = 0;
  std::vector<double> p(kClasses), q(kClasses);
  for (int64_t r = 0; r < kRows; ++r) {
    const float* z = &data.logits[r * kClasses];
    double sum = 0;
    for (int64_t c = 0; c < kClasses; ++c) sum += p[c] = std::exp(static_cast<double>(z[c]));
    for (double& value : p) value /= sum;
    std::fill(q.begin(), q.end(), -1);
    double others = 1;
    for (int64_t i = r * kTopK; i < (r + 1) * kTopK; ++i) {
      q[data.index[i]] = data.value[i];
      others -= p[data.index[i]];
      loss -= data.value[i] * std::log(p[data.index[i]]);
    }
    loss -= data.tail[r] * std::log(others) + std::log(p[data.labels[r]]);
    for (int64_t c = 0; c < kClasses; ++c) {
      const double psi = q[c] >= 0 ? p[c] - q[c] : p[c] * (1 - data.tail[r] / others);
      const double expected = (p[c] + psi - (c == data.labels[r] ? 1 : 0)) / kRows;
      const double actual = data.gradient[r * kClasses + c];
      if (!(std::abs(actual - expected) <= 1e-10 + 1e-5 * std::abs(expected))) {
        return "gradient differs in row " + std::to_string(r) + " class " + std::to_string(c);
      }
    }
  }
  const double actual = outputs.sums.label_loss_sum + outputs.sums.teacher_loss_sum;
  return std::abs(actual - loss) < 1e-6 * loss ? "" : "loss differs";
}

void BM_LossTopK(benchmark::State& state) {
  const int threads = static_cast<int>(state.range(0));
  Data& data = SharedData();
  LossInputs inputs = data.Inputs(false);
  inputs.topk_teachers = absl::MakeConstSpan(&data.top_k, 1);
  inputs.teacher_weight = 1;
  LossOutputs outputs;
  outputs.gradient = data.gradient.data();
  if (!ComputeLossCpu(LossOptions(), inputs, &outputs, threads).ok()) {
    state.SkipWithError("the loss failed");
    return;
  }
  const std::string problem = CheckTopK(data, outputs);
  if (!problem.empty()) {
    state.SkipWithError(problem.c_str());
    return;
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(ComputeLossCpu(LossOptions(), inputs, &outputs, threads).ok());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * kElements * sizeof(float));
}
BENCHMARK(BM_LossTopK)
    ->ArgNames({"threads"})
    ->Arg(1)
    ->Arg(2)
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

// Moves as many bytes as the loss with a teacher: reads and writes one and a half arrays.
void BM_Memcpy(benchmark::State& state) {
  Data& data = SharedData();
  constexpr size_t kBytes = kElements * sizeof(float);
  for (auto _ : state) {
    std::memcpy(data.gradient.data(), data.logits.data(), kBytes);
    std::memcpy(data.gradient.data(), data.teacher.data(), kBytes / 2);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 3 * kBytes);
}
BENCHMARK(BM_Memcpy)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace codistill

BENCHMARK_MAIN();
