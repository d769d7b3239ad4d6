// Speed of the kernels in cuda/ but for the loss, on a CUDA device:
//
//   gpu_kernels [--quick]
//
// Built with --config=cuda. Each kernel in alternation with a copy from device memory to device
// memory that moves as many bytes - what the kernel reads and writes, once each. Arrays are many
// times the size of the caches. Every element of every result is checked against the CPU's before
// anything is timed. The last line is a JSON object.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "cuda/conversion_cuda.h"
#include "cuda/embedding_cuda.h"
#include "cuda/global_norm_cuda.h"
#include "cuda/row_topk_cuda.h"
#include "tests/benchmarks/gpu_harness.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

int Threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

// Approximately normal, and quick: a sum of uniforms.
std::vector<float> Normal(int64_t n, double spread, uint64_t seed) {
  RandomStream random(seed);
  std::vector<float> values(n);
  for (float& value : values) {
    const uint64_t bits = random.Next();
    const auto sum = static_cast<double>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                         (bits >> 32 & 0xffff) + (bits >> 48));
    value = static_cast<float>(spread * (sum - 2 * 65535) / 37837);
  }
  return values;
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

class Benchmark {
 public:
  Benchmark(bool quick, nlohmann::ordered_json* report)
      : rounds_(quick ? 3 : 10), scale_(quick ? 8 : 1), report_(report) {}

  void Run() {
    Embedding(16);
    Embedding(64);
    Conversions();
    Int8(16384, 8192 / scale_);
    Int8(2048, 24000 / scale_);
    Norm();
    TopK(2048, 24000 / scale_, 64);
    TopK(2048, 24000 / scale_, 1024);
    TopK(512, 128000 / scale_, 64);
  }

 private:
  // Times `kernel`, which has run and been checked, against a copy.
  void Measure(const std::string& name, double bytes, const std::function<void()>& kernel) {
    nlohmann::ordered_json figures = timer_.AgainstCopy(rounds_, bytes, kernel);
    std::printf("%-28s %9.1f us  %7.1f GB/s  %5.2f of a copy\n", name.c_str(),
                figures["us"].get<double>(), figures["gbps"].get<double>(),
                figures["vs_copy"].get<double>());
    (*report_)[name] = std::move(figures);
  }

  void Embedding(int64_t dim) {
    const int64_t rows = 4000000 / scale_, places = (64 << 20) / dim / scale_;
    const std::vector<float> table = Normal(rows * dim, 1, 1);
    const std::vector<uint32_t> index = PopularRows(places, rows, 2);
    {
      const OnDevice<float> device_table(table), to(places * dim);
      const OnDevice<uint32_t> device_index(index);
      const OnDevice<char> workspace(kGatherWorkspaceBytes);
      auto gather = [&] {
        Require(LaunchGatherRows(device_table.get(), rows, dim, device_index.get(), places,
                                 to.get(), workspace.get(), stream_));
      };
      gather();
      Require(FinishGatherRows(rows, workspace.get(), stream_));
      std::vector<float> want(places * dim);
      Require(GatherRowsCpu(table.data(), rows, dim, index, want.data(), Threads()));
      Require(to.Fetch() == want, "gather differs");
      Measure(absl::StrCat("gather_", dim), 4.0 * static_cast<double>(2 * places * dim + places),
              gather);
    }
    // The batch's own rows, each once.
    std::vector<int32_t> seen(rows, -1);
    std::vector<uint32_t> keys;
    int64_t num_keys = 0;
    for (const uint32_t row : index) {
      if (seen[row] < 0) seen[row] = static_cast<int32_t>(num_keys++);
      keys.push_back(static_cast<uint32_t>(seen[row]));
    }
    Segments segments;
    Require(FindSegments(keys, num_keys, &segments));
    const std::vector<float> gradients = Normal(places * dim, 1, 3);
    const OnDevice<uint32_t> offsets(segments.offsets), positions(segments.positions);
    const OnDevice<SegmentPiece> pieces(segments.pieces);
    const OnDevice<LongSegment> long_segments(segments.long_segments);
    SegmentsView view = segments.View();
    view.offsets = offsets.get();
    view.positions = positions.get();
    view.pieces = pieces.get();
    view.long_segments = long_segments.get();
    const OnDevice<float> device_gradients(gradients), to(num_keys * dim);
    const OnDevice<char> workspace(SegmentSumWorkspaceBytes(view, dim));
    auto sum = [&] {
      Require(LaunchSegmentSum(view, device_gradients.get(), places, dim, false, to.get(),
                               workspace.get(), stream_));
    };
    sum();
    Require(FinishSegmentSum(view, places, workspace.get(), stream_));
    std::vector<float> want(num_keys * dim);
    Require(SumSegmentsCpu(segments.View(), gradients.data(), places, dim, false, want.data(),
                           Threads()));
    Require(to.Fetch() == want, "segment sum differs");
    Measure(absl::StrCat("segment_sum_", dim),
            4.0 * static_cast<double>(places * dim + places + num_keys * (dim + 1)), sum);
  }

  void Conversions() {
    const int64_t n = (128 << 20) / scale_;
    const std::vector<float> floats = Normal(n, 1, 4);
    const OnDevice<float> from(floats), back(n);
    const OnDevice<uint16_t> halves(n);
    for (const NumberFormat format : {NumberFormat::kBfloat16, NumberFormat::kFloat16}) {
      auto narrow = [&] {
        Require(
            LaunchConvert(from.get(), NumberFormat::kFloat32, n, halves.get(), format, stream_));
      };
      auto widen = [&] {
        Require(
            LaunchConvert(halves.get(), format, n, back.get(), NumberFormat::kFloat32, stream_));
      };
      narrow();
      widen();
      Require(cudaStreamSynchronize(stream_));
      std::vector<uint16_t> want(n);
      Require(ConvertCpu(floats.data(), NumberFormat::kFloat32, n, want.data(), format, Threads()));
      Require(halves.Fetch() == want, "narrowing differs");
      std::vector<float> want_back(n);
      Require(
          ConvertCpu(want.data(), format, n, want_back.data(), NumberFormat::kFloat32, Threads()));
      Require(back.Fetch() == want_back, "widening differs");
      Measure(absl::StrCat("to_", NameOf(format)), 6.0 * static_cast<double>(n), narrow);
      Measure(absl::StrCat("from_", NameOf(format)), 6.0 * static_cast<double>(n), widen);
    }
  }

  void Int8(int64_t rows, int64_t columns) {
    const int64_t n = rows * columns;
    const std::vector<float> floats = Normal(n, 1, 5);
    const OnDevice<float> from(floats), scales(rows), back(n);
    const OnDevice<int8_t> to(n);
    const OnDevice<char> workspace(kQuantizeWorkspaceBytes);
    auto quantize = [&] {
      Require(LaunchQuantizeRows(from.get(), rows, columns, to.get(), scales.get(), workspace.get(),
                                 stream_));
    };
    auto dequantize = [&] {
      Require(LaunchDequantizeRows(to.get(), scales.get(), rows, columns, back.get(), stream_));
    };
    quantize();
    Require(FinishQuantizeRows(workspace.get(), stream_));
    dequantize();
    Require(cudaStreamSynchronize(stream_));
    std::vector<int8_t> want(n);
    std::vector<float> want_scales(rows), want_back(n);
    Require(
        QuantizeRowsCpu(floats.data(), rows, columns, want.data(), want_scales.data(), Threads()));
    Require(DequantizeRowsCpu(want.data(), want_scales.data(), rows, columns, want_back.data(),
                              Threads()));
    Require(to.Fetch() == want && scales.Fetch() == want_scales, "quantisation differs");
    Require(back.Fetch() == want_back, "dequantisation differs");
    const std::string shape = absl::StrCat("_", rows, "x", columns);
    Measure("to_int8" + shape, 5.0 * static_cast<double>(n), quantize);
    Measure("from_int8" + shape, 5.0 * static_cast<double>(n), dequantize);
  }

  void Norm() {
    const std::vector<int64_t> sizes = ResNet50LikeSizes((256 << 20) / scale_);
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    const std::vector<float> values = Normal(total, 1, 6);
    const OnDevice<float> device(values);
    std::vector<FloatArray> list, device_list;
    int64_t at = 0;
    for (const int64_t size : sizes) {
      list.push_back({values.data() + at, size});
      device_list.push_back({device.get() + at, size});
      at += size;
    }
    const OnDevice<char> workspace(GlobalNormWorkspaceBytes(device_list));
    auto launch = [&] { Require(LaunchGlobalNorm(device_list, workspace.get(), stream_)); };
    launch();
    GlobalNorm norm, want;
    Require(FinishGlobalNorm(workspace.get(), stream_, &norm));
    Require(GlobalNormCpu(list, Threads(), &want));
    Require(norm.first_not_finite == -1 &&
                std::abs(norm.sum_of_squares / want.sum_of_squares - 1) < 1e-12,
            "norm differs");
    Measure(absl::StrCat("global_norm_", sizes.size(), "_tensors"),
            4.0 * static_cast<double>(total), launch);
  }

  void TopK(int64_t rows, int64_t classes, int64_t k) {
    const std::vector<float> logits = Normal(rows * classes, 3, 7);
    const OnDevice<float> device(logits), value(rows * k), tail(rows);
    const OnDevice<int32_t> index(rows * k);
    const OnDevice<char> workspace(kRowTopKWorkspaceBytes);
    RowTopKInputs inputs;
    inputs.logits = logits.data();
    inputs.rows = rows;
    inputs.classes = classes;
    inputs.k = k;
    std::vector<int32_t> want_index(rows * k);
    std::vector<float> want_value(rows * k), want_tail(rows);
    RowTopKOutputs outputs;
    outputs.index = want_index.data();
    outputs.value = want_value.data();
    outputs.tail = want_tail.data();
    Require(RowTopKCpu(inputs, outputs, Threads()));
    inputs.logits = device.get();
    outputs.index = index.get();
    outputs.value = value.get();
    outputs.tail = tail.get();
    auto launch = [&] { Require(LaunchRowTopK(inputs, outputs, workspace.get(), stream_)); };
    launch();
    Require(FinishRowTopK(workspace.get(), stream_));
    Require(index.Fetch() == want_index, "the k largest differ");
    auto agree = [](const std::vector<float>& a, const std::vector<float>& b) {
      for (size_t i = 0; i < a.size(); ++i) {
        if (!(std::abs(a[i] - b[i]) <= 1e-5 * std::abs(b[i]) + 1e-30)) return false;
      }
      return true;
    };
    Require(agree(value.Fetch(), want_value), "the probabilities differ");
    Require(agree(tail.Fetch(), want_tail), "the tail mass differs");
    Measure(absl::StrCat("row_topk_", rows, "x", classes, "_k", k),
            4.0 * static_cast<double>(rows * classes), launch);
  }

  const int rounds_;
  const int64_t scale_;  // sizes are divided by it
  nlohmann::ordered_json* const report_;
  GpuTimer timer_;
  const cudaStream_t stream_ = timer_.stream();
};

int Main(bool quick) {
  if (!HasDevice("gpu_kernels")) return 2;
  nlohmann::ordered_json report = NewGpuReport("gpu_kernels", quick ? 3 : 10);
  Benchmark(quick, &report).Run();
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::string(argv[1]) == "--quick");
}
