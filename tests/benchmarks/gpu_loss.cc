// Speed of the codistillation loss on a CUDA device:
//
//   gpu_loss [--quick]
//
// Built with --config=cuda. Loss and gradient in alternation with a copy from device memory to
// device memory that moves as many bytes - logits, teacher and gradient, once each - in float32 and
// bfloat16, for the vocabularies of a language model; deploy/gpu/loss_pytorch.py measures PyTorch
// on the same shapes. Before anything is timed every element of the gradient is checked: the batch
// repeats a few rows, of which all elements are compared with the CPU's, and the gradients of
// repeated rows must be the same to the bit. The last line is a JSON object.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/random.h"
#include "common/tensor/bfloat16.h"
#include "cuda/loss.h"
#include "cuda/loss_cuda.h"
#include "tests/benchmarks/gpu_harness.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

// Rows that differ.
constexpr int64_t kDistinctRows = 64;

struct Variant {
  const char* name;
  DenseTeacher::Kind kind;
  float temperature;
};
constexpr Variant kVariants[] = {
    {"logits_t1", DenseTeacher::kLogits, 1},
    {"logits_t2", DenseTeacher::kLogits, 2},
    {"probabilities_t1", DenseTeacher::kProbabilities, 1},
};

std::vector<unsigned char> Encode(const std::vector<float>& values, NumberFormat format) {
  std::vector<unsigned char> bytes(values.size() * BytesOf(format));
  if (format == NumberFormat::kFloat32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    ToBfloat16(values.data(), values.size(), reinterpret_cast<uint16_t*>(bytes.data()));
  }
  return bytes;
}

double Decode(const std::vector<unsigned char>& bytes, NumberFormat format, int64_t i) {
  if (format == NumberFormat::kFloat32) return reinterpret_cast<const float*>(bytes.data())[i];
  return FromBfloat16(reinterpret_cast<const uint16_t*>(bytes.data())[i]);
}

std::vector<float> Normal(int64_t n, double spread, uint64_t seed) {
  RandomStream random(seed);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(spread * random.Normal());
  return values;
}

std::vector<float> Softmax(const std::vector<float>& logits, int64_t classes) {
  std::vector<float> q(logits.size());
  for (size_t row = 0; row < logits.size(); row += classes) {
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(logits[row + c]);
    for (int64_t c = 0; c < classes; ++c) {
      q[row + c] = static_cast<float>(std::exp(logits[row + c]) / sum);
    }
  }
  return q;
}

// The distinct rows, over and over.
void Tile(const std::vector<unsigned char>& rows, OnDevice<unsigned char>* to) {
  for (size_t at = 0; at < to->size(); at += rows.size()) {
    Require(cudaMemcpy(to->get() + at, rows.data(), rows.size(), cudaMemcpyHostToDevice));
  }
}

void Measure(const Variant& variant, int64_t rows, int64_t classes, NumberFormat format, int rounds,
             nlohmann::ordered_json* report) {
  const std::string name =
      absl::StrCat(rows, "x", classes, "_", format == NumberFormat::kFloat32 ? "fp32" : "bf16", "_",
                   variant.name);
  const int64_t distinct = kDistinctRows * classes;
  const std::vector<float> taught = Normal(distinct, 2, 2);
  const std::vector<unsigned char> logits = Encode(Normal(distinct, 2, 1), format);
  const std::vector<unsigned char> teacher =
      Encode(variant.kind == DenseTeacher::kLogits ? taught : Softmax(taught, classes), format);
  std::vector<int64_t> labels(rows);
  for (int64_t r = 0; r < rows; ++r) labels[r] = r % kDistinctRows * 7919 % classes;

  LossOptions options;
  options.temperature = variant.temperature;
  DenseTeacher view;
  view.values = teacher.data();
  view.format = format;
  view.kind = variant.kind;
  LossInputs inputs;
  inputs.rows = kDistinctRows;
  inputs.classes = classes;
  inputs.logits = logits.data();
  inputs.logits_format = format;
  inputs.labels = labels.data();
  inputs.teachers = absl::MakeConstSpan(&view, 1);
  inputs.teacher_weight = 0.5f;
  // The gradient of the mean over all rows.
  inputs.gradient_scale = static_cast<double>(kDistinctRows) / static_cast<double>(rows);
  std::vector<unsigned char> want(logits.size());
  LossOutputs cpu;
  cpu.gradient = want.data();
  Require(
      ComputeLossCpu(options, inputs, &cpu, static_cast<int>(std::thread::hardware_concurrency())));

  const size_t bytes = static_cast<size_t>(rows) * classes * BytesOf(format);
  OnDevice<unsigned char> device_logits(bytes), device_teacher(bytes);
  const OnDevice<unsigned char> gradient(bytes);
  const OnDevice<int64_t> device_labels(labels);
  Tile(logits, &device_logits);
  Tile(teacher, &device_teacher);
  view.values = device_teacher.get();
  inputs.rows = rows;
  inputs.logits = device_logits.get();
  inputs.labels = device_labels.get();
  inputs.gradient_scale = 1;
  const OnDevice<unsigned char> workspace(CudaLossWorkspaceBytes(inputs));
  GpuTimer timer;
  const auto launch = [&] {
    Require(LaunchLoss(options, inputs, gradient.get(), workspace.get(), timer.stream()));
  };

  launch();
  LossOutputs outputs;
  Require(FinishLoss(options, inputs, workspace.get(), timer.stream(), &outputs));
  const double tiles = static_cast<double>(rows) / static_cast<double>(kDistinctRows);
  const auto near = [](double a, double b) { return std::abs(a - b) <= 2e-6 * std::abs(b); };
  Require(near(outputs.sums.label_loss_sum, tiles * cpu.sums.label_loss_sum) &&
              near(outputs.sums.teacher_loss_sum, tiles * cpu.sums.teacher_loss_sum),
          absl::StrCat(name, ": the losses differ"));
  const std::vector<unsigned char> got = gradient.Fetch();
  // Probabilities of about 1 / rows, of which elements are differences.
  const double floor = 1e-6 / static_cast<double>(rows);
  const double relative = format == NumberFormat::kFloat32 ? 1e-5 : 1e-2;
  for (int64_t i = 0; i < distinct; ++i) {
    const double a = Decode(got, format, i), b = Decode(want, format, i);
    Require(std::abs(a - b) <= relative * std::abs(b) + floor,
            absl::StrCat(name, ": element ", i, " is ", a, " instead of ", b));
  }
  for (size_t at = want.size(); at < got.size(); at += want.size()) {
    Require(std::memcmp(got.data(), got.data() + at, want.size()) == 0,
            absl::StrCat(name, ": repeated rows differ, from byte ", at, " on"));
  }

  nlohmann::ordered_json figures =
      timer.AgainstCopy(rounds, 3.0 * static_cast<double>(bytes), launch);
  std::printf("%-40s %9.1f us  %7.1f GB/s  %5.2f of a copy\n", name.c_str(),
              figures["us"].get<double>(), figures["gbps"].get<double>(),
              figures["vs_copy"].get<double>());
  (*report)[name] = std::move(figures);
}

int Main(bool quick) {
  if (!HasDevice("gpu_loss")) return 2;
  const int rounds = quick ? 3 : 10;
  nlohmann::ordered_json report = NewGpuReport("gpu_loss", rounds);
  for (int64_t rows : {2048, 8192}) {
    if (quick && rows > 2048) continue;
    for (int64_t classes : {24000, 128000}) {
      for (NumberFormat format : {NumberFormat::kFloat32, NumberFormat::kBfloat16}) {
        for (const Variant& variant : kVariants) {
          Measure(variant, rows, classes, format, rounds, &report);
        }
      }
    }
  }
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::string(argv[1]) == "--quick");
}
