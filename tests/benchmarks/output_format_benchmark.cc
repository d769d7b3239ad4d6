// Speed of the formats in which a prediction server answers (predserver/output_format.h), in bytes
// of logits read, next to a memcpy of the same logits.
//
//   output_format_benchmark --benchmark_enable_random_interleaving=true --benchmark_repetitions=10
//
// 256 rows of 24,000 classes; normal logits of standard deviation 3. Every configuration checks its
// result before it is timed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "benchmark/benchmark.h"
#include "common/base/random.h"
#include "predserver/output_format.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

constexpr int64_t kRows = 256, kClasses = 24000;

const Tensor& Logits() {
  static const Tensor* const logits = [] {
    auto* made = new Tensor(Tensor::Allocate(DT_FLOAT, {kRows, kClasses}));
    RandomStream random(1);
    for (float& z : made->As<float>()) z = static_cast<float>(3 * random.Normal());
    return made;
  }();
  return *logits;
}

// Whether what each row says adds up: probabilities to 1, classes in falling order.
std::string Check(const std::vector<NamedTensor>& outputs, const OutputFormat& format) {
  if (outputs.empty()) return "no outputs";
  if (outputs[0].name == kProbabilitiesOutput && format.dtype == DT_FLOAT) {
    for (int64_t r = 0; r < kRows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < kClasses; ++c) {
        sum += outputs[0].tensor.As<float>()[r * kClasses + c];
      }
      if (std::abs(sum - 1) > 1e-4) return "probabilities do not add up to 1";
    }
  }
  if (outputs[0].name == kTopKIndexOutput) {
    for (int64_t r = 0; r < kRows; ++r) {
      const float* z = Logits().As<float>().data() + r * kClasses;
      std::vector<float> sorted(z, z + kClasses);
      std::sort(sorted.begin(), sorted.end(), std::greater<float>());
      for (int64_t i = 0; i < format.top_k; ++i) {
        const int32_t c = outputs[0].tensor.As<int32_t>()[r * format.top_k + i];
        if (z[c] != sorted[i]) return "not the largest";
      }
    }
  }
  return "";
}

void Measure(benchmark::State& state, const RequestPlan& plan, const OutputFormat& format) {
  const auto outputs = FormatOutputs(Logits(), SOFTMAX_CROSS_ENTROPY, plan, format);
  const std::string problem =
      outputs.ok() ? Check(*outputs, format) : std::string(outputs.status().message());
  if (!problem.empty()) {
    state.SkipWithError(problem.c_str());
    return;
  }
  for (auto _ : state) {
    benchmark::DoNotOptimize(FormatOutputs(Logits(), SOFTMAX_CROSS_ENTROPY, plan, format).ok());
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(Logits().bytes()));
}

void BM_Logits(benchmark::State& state) {
  OutputFormat format;
  format.dtype = static_cast<DataType>(state.range(0));
  state.SetLabel(DataType_Name(format.dtype));
  RequestPlan plan;
  plan.want_logits_scale = format.dtype == DT_INT8;
  Measure(state, plan, format);
}
BENCHMARK(BM_Logits)->Arg(DT_FLOAT)->Arg(DT_HALF)->Arg(DT_BFLOAT16)->Arg(DT_INT8)->UseRealTime();

void BM_Probabilities(benchmark::State& state) {
  OutputFormat format;
  format.dtype = static_cast<DataType>(state.range(0));
  state.SetLabel(DataType_Name(format.dtype));
  RequestPlan plan;
  plan.want_logits = false;
  plan.want_probabilities = true;
  Measure(state, plan, format);
}
BENCHMARK(BM_Probabilities)->Arg(DT_FLOAT)->Arg(DT_HALF)->UseRealTime();

void BM_TopK(benchmark::State& state) {
  OutputFormat format;
  format.dtype = DT_HALF;
  format.top_k = state.range(0);
  RequestPlan plan;
  plan.want_logits = false;
  plan.want_top_k_index = plan.want_top_k_value = plan.want_tail_mass = true;
  Measure(state, plan, format);
}
BENCHMARK(BM_TopK)->Arg(1)->Arg(64)->Arg(1024)->UseRealTime();

void BM_Memcpy(benchmark::State& state) {
  Tensor to = Tensor::Zeros(DT_FLOAT, {kRows, kClasses});
  for (auto _ : state) {
    std::memcpy(to.data(), Logits().data(), to.bytes());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(to.bytes()));
}
BENCHMARK(BM_Memcpy)->UseRealTime();

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RetainHeap();
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
