// Speed of the codistillation loss and its gradient, next to a memcpy that moves as many bytes.
//
//   loss_benchmark --benchmark_enable_random_interleaving=true --benchmark_repetitions=10
//
// The shape is that of a language model's batch: 2,048 positions, 24,000 word pieces, dense
// teacher. Each configuration checks every element of its result before it is timed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "common/base/random.h"
#include "cuda/loss.h"

namespace codistill {
namespace {

constexpr int64_t kRows = 2048, kClasses = 24000, kElements = kRows * kClasses;

struct Data {
  std::vector<float> logits, teacher, gradient;
  std::vector<int64_t> labels;
  const float* teacher_pointer;

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
    teacher_pointer = teacher.data();
  }

  LossInputs Inputs(bool teach) const {
    LossInputs inputs;
    inputs.rows = kRows;
    inputs.classes = kClasses;
    inputs.logits = logits.data();
    inputs.labels = labels.data();
    if (teach) {
      inputs.teachers = absl::MakeConstSpan(&teacher_pointer, 1);
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
