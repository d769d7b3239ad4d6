// The codistillation loss and its gradient on the processor, next to libtorch's autograd and to a
// memcpy that moves as many bytes.
//
//   loss [--quick]
//
// The shape is that of a language model's batch: 2,048 positions, 24,000 word pieces. Every element
// of every result is checked against double precision before anything is timed; some rows have
// logits of +-80.

#include "cuda/loss.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/parallel.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/torch_loss.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kRows = 2048, kClasses = 24000, kElements = kRows * kClasses;
constexpr int64_t kChunkRows = 32;
// What the task has to move: logits and teacher in, gradient out.
constexpr double kBytes = 12.0 * kElements;

// Approximately normal with deviation 2.3, and quick: sums of uniforms.
void FillLogits(uint64_t seed, PrefaultedArray* array) {
  RandomStream random(seed);
  for (float& value : array->span()) {
    const uint64_t bits = random.Next();
    value = static_cast<float>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) +
                               (bits >> 48)) /
                16384.0f -
            8.0f;
  }
  // The sums of uniforms end at +-8.
  for (int64_t r = 5; r < kRows; r += 64) {
    for (int64_t c = 0; c < kClasses; ++c) array->data()[r * kClasses + c] *= 10;
    array->data()[r * kClasses + r] = 80;
    array->data()[r * kClasses + r + 1] = -80;
  }
}

// softmax(x / temperature) of a row.
std::vector<double> Softmax(const float* x, double temperature) {
  const double max = *std::max_element(x, x + kClasses);
  std::vector<double> p(kClasses);
  double sum = 0;
  for (int64_t c = 0; c < kClasses; ++c) sum += p[c] = std::exp((x[c] - max) / temperature);
  for (double& value : p) value /= sum;
  return p;
}

struct Task {
  std::string name;
  bool probabilities = true;
  float temperature = 1;
};

class LossMeasurement {
 public:
  LossMeasurement()
      : logits_(kElements),
        teacher_(kElements),
        probabilities_(kElements),
        gradient_(kElements),
        labels_(kRows) {
    FillLogits(1, &logits_);
    FillLogits(2, &teacher_);
    RandomStream random(3);
    for (int64_t& label : labels_) label = static_cast<int64_t>(random.Below(kClasses));
    ParallelFor(2, kRows, 64, [this](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const std::vector<double> q = Softmax(teacher_.data() + r * kClasses, 1);
        for (int64_t c = 0; c < kClasses; ++c) {
          probabilities_.data()[r * kClasses + c] = static_cast<float>(q[c]);
        }
      }
    });
  }

  // Bytes that the first call takes beyond what was there before.
  absl::StatusOr<double> ExtraBytes(const Task& task, int threads) {
    const int64_t before = StatusKilobytes("VmRSS");
    std::ofstream("/proc/self/clear_refs") << 5;  // the peak starts again
    CODISTILL_RETURN_IF_ERROR(Compute(task, threads).status());
    return static_cast<double>(StatusKilobytes("VmHWM") - before) * 1024;
  }

  // Whether loss and gradient are right everywhere.
  absl::Status Check(const Task& task, int threads) {
    CODISTILL_ASSIGN_OR_RETURN(const LossOutputs outputs, Compute(task, threads));
    std::vector<double> losses(kRows);
    std::vector<std::string> wrong(kRows);
    ParallelFor(2, kRows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) wrong[r] = CheckRow(task, r, &losses[r]);
    });
    double loss = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      if (!wrong[r].empty()) return absl::InternalError(absl::StrCat(task.name, ": ", wrong[r]));
      loss += losses[r];
    }
    const double got = outputs.sums.label_loss_sum + outputs.sums.teacher_loss_sum;
    if (!(std::abs(got - loss) <= 2e-6 * loss)) {
      return absl::InternalError(absl::StrCat(task.name, ": the loss is ", got, " for ", loss));
    }
    // And of every row alone.
    for (int64_t r = 0; r < kRows; ++r) {
      LossInputs inputs = Inputs();
      DenseTeacher teacher = TeacherOf(task);
      teacher.values = static_cast<const float*>(teacher.values) + r * kClasses;
      inputs.rows = 1;
      inputs.logits = logits_.data() + r * kClasses;
      inputs.labels = &labels_[r];
      inputs.teachers = absl::MakeConstSpan(&teacher, 1);
      LossOutputs row;
      CODISTILL_RETURN_IF_ERROR(ComputeLossCpu(OptionsOf(task), inputs, &row, 1));
      const double alone = row.sums.label_loss_sum + row.sums.teacher_loss_sum;
      if (!(std::abs(alone - losses[r]) <= 2e-6 * std::max(1.0, losses[r]))) {
        return absl::InternalError(
            absl::StrCat(task.name, ": the loss of row ", r, " is ", alone, " for ", losses[r]));
      }
    }
    return absl::OkStatus();
  }

  // Whether the baseline computes the same; to its own precision.
  absl::Status CheckTorch(const Task& task, int64_t chunk) {
    CODISTILL_ASSIGN_OR_RETURN(const LossOutputs outputs, Compute(task, 2));
    const std::vector<float> ours(gradient_.data(), gradient_.data() + kElements);
    const double loss = TorchLoss(TorchInputs(task), chunk, gradient_.data());
    const double expected = (outputs.sums.label_loss_sum + outputs.sums.teacher_loss_sum) / kRows;
    if (!(std::abs(loss - expected) <= 1e-4 * expected)) {
      return absl::InternalError(absl::StrCat("libtorch's loss is ", loss, " for ", expected));
    }
    for (int64_t i = 0; i < kElements; ++i) {
      if (!(std::abs(gradient_.data()[i] - ours[i]) <= 1e-8 + 1e-3 * std::abs(ours[i]))) {
        return absl::InternalError(absl::StrCat("libtorch's gradient is ", gradient_.data()[i],
                                                " for ", ours[i], " at ", i));
      }
    }
    return absl::OkStatus();
  }

  Contestant Ours(const Task& task, int threads) {
    return {absl::StrCat(task.name, "_", threads, "t"), OnThreads(threads, [this, task, threads] {
              if (!Compute(task, threads).ok()) std::abort();
            })};
  }

  Contestant Torch(const Task& task, int threads, int64_t chunk) {
    const bool whole = chunk == kRows;
    return {absl::StrCat("libtorch_", whole ? "whole" : "chunks", "_", threads, "t"),
            OnThreads(threads, [this, task, threads, chunk, whole] {
              SetTorchThreads(threads);
              TorchLoss(TorchInputs(task), chunk, whole ? nullptr : gradient_.data());
            })};
  }

  // Reads and writes one and a half arrays: as many bytes as the loss.
  Contestant Memcpy(int threads) {
    return {absl::StrCat("memcpy_", threads, "t"), OnThreads(threads, [this, threads] {
              CopyOnce(logits_, kElements, threads);
              CopyOnce(teacher_, kElements / 2, threads);
            })};
  }

 private:
  // Seconds of `body`: on one thread on core 0, so that it does not wander.
  static std::function<double()> OnThreads(int threads, std::function<void()> body) {
    return [threads, body = std::move(body)] {
      const absl::Status status = threads == 1 ? PinToCore(0) : Unpin();
      if (!status.ok()) std::abort();
      // The threads of libtorch's OpenMP keep a core busy for a while after their last work.
      absl::SleepFor(absl::Milliseconds(20));
      const double seconds = Seconds(body);
      if (!Unpin().ok()) std::abort();
      return seconds;
    };
  }

  void CopyOnce(const PrefaultedArray& from, int64_t elements, int threads) {
    ParallelFor(threads, elements / 64, 1, [&](int64_t begin, int64_t end) {
      std::memcpy(gradient_.data() + begin * 64, from.data() + begin * 64,
                  (end - begin) * 64 * sizeof(float));
    });
  }

  static int64_t StatusKilobytes(const std::string& field) {
    std::ifstream file("/proc/self/status");
    std::string name;
    while (file >> name) {
      int64_t value = 0;
      if (name == field + ":" && file >> value) return value;
      file.ignore(1000, '\n');
    }
    return 0;
  }

  static LossOptions OptionsOf(const Task& task) {
    LossOptions options;
    options.temperature = task.temperature;
    return options;
  }

  DenseTeacher TeacherOf(const Task& task) const {
    DenseTeacher teacher;
    teacher.values = task.probabilities ? probabilities_.data() : teacher_.data();
    teacher.kind = task.probabilities ? DenseTeacher::kProbabilities : DenseTeacher::kLogits;
    return teacher;
  }

  LossInputs Inputs() const {
    LossInputs inputs;
    inputs.rows = kRows;
    inputs.classes = kClasses;
    inputs.logits = logits_.data();
    inputs.labels = labels_.data();
    inputs.teacher_weight = 1;
    return inputs;
  }

  TorchLossInputs TorchInputs(const Task& task) const {
    TorchLossInputs inputs;
    inputs.rows = kRows;
    inputs.classes = kClasses;
    inputs.logits = logits_.data();
    inputs.labels = labels_.data();
    inputs.teacher = task.probabilities ? probabilities_.data() : teacher_.data();
    inputs.probabilities = task.probabilities;
    inputs.temperature = task.temperature;
    return inputs;
  }

  absl::StatusOr<LossOutputs> Compute(const Task& task, int threads) {
    LossInputs inputs = Inputs();
    const DenseTeacher teacher = TeacherOf(task);
    inputs.teachers = absl::MakeConstSpan(&teacher, 1);
    LossOutputs outputs;
    outputs.gradient = gradient_.data();
    CODISTILL_RETURN_IF_ERROR(ComputeLossCpu(OptionsOf(task), inputs, &outputs, threads));
    return outputs;
  }

  std::string CheckRow(const Task& task, int64_t r, double* loss) const {
    const double t = task.temperature;
    const float* z = logits_.data() + r * kClasses;
    const float* given = (task.probabilities ? probabilities_ : teacher_).data() + r * kClasses;
    const std::vector<double> p = Softmax(z, 1), warm = Softmax(z, t);
    std::vector<double> q;
    if (task.probabilities) {
      q.assign(given, given + kClasses);
      double sum = 0;
      for (double value : q) sum += value;
      for (double& value : q) value /= sum;
    } else {
      q = Softmax(given, t);
    }
    // Logarithms of the softmax itself: its probabilities may vanish.
    const auto log_sum = [&](double temperature) {
      const double max = *std::max_element(z, z + kClasses);
      double sum = 0;
      for (int64_t c = 0; c < kClasses; ++c) sum += std::exp((z[c] - max) / temperature);
      return max / temperature + std::log(sum);
    };
    const double log_p = log_sum(1), log_warm = log_sum(t);
    *loss = log_p - z[labels_[r]];
    for (int64_t c = 0; c < kClasses; ++c) {
      *loss += t * t * q[c] * (log_warm - z[c] / t);
      const double hit = c == labels_[r] ? 1 : 0;
      const double expected = (p[c] - hit + t * (warm[c] - q[c])) / kRows;
      const double terms = (p[c] + hit + t * (warm[c] + q[c])) / kRows;
      const double got = gradient_.data()[r * kClasses + c];
      if (!(std::abs(got - expected) <= 1e-5 * terms + 1e-10)) {
        return absl::StrCat("the gradient is ", got, " for ", expected, " in row ", r, ", class ",
                            c);
      }
    }
    return "";
  }

  PrefaultedArray logits_, teacher_, probabilities_, gradient_;
  std::vector<int64_t> labels_;
};

std::vector<double> Faster(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> best;
  for (size_t i = 0; i < a.size(); ++i) best.push_back(std::min(a[i], b[i]));
  return best;
}

absl::Status Run(bool quick) {
  const int rounds = quick ? 3 : 12;
  const Task given{"probabilities", true, 1}, logits{"logits_t2", false, 2},
      logits_1{"logits_t1", false, 1};
  // Before the first of anybody's large allocations, which stay with the process.
  LossMeasurement measurement;
  CODISTILL_ASSIGN_OR_RETURN(const double extra, measurement.ExtraBytes(given, 2));
  CODISTILL_ASSIGN_OR_RETURN(const double extra_logits, measurement.ExtraBytes(logits, 2));
  RetainHeap();
  for (const Task& task : {given, logits, logits_1}) {
    for (int threads : {1, 2}) CODISTILL_RETURN_IF_ERROR(measurement.Check(task, threads));
  }
  std::vector<Contestant> contestants;
  for (int threads : {2, 1}) {
    SetTorchThreads(threads);
    for (int64_t chunk : {kChunkRows, kRows}) {
      CODISTILL_RETURN_IF_ERROR(measurement.CheckTorch(given, chunk));
      contestants.push_back(measurement.Torch(given, threads, chunk));
    }
    for (const Task& task : {given, logits, logits_1}) {
      contestants.push_back(measurement.Ours(task, threads));
    }
    contestants.push_back(measurement.Memcpy(threads));
  }
  Alternate(1, contestants);  // warm
  const std::map<std::string, std::vector<double>> seconds = Alternate(rounds, contestants);

  Json report = NewReport("loss", rounds, "one thread: core 0; two: none");
  report["rows"] = kRows;
  report["classes"] = kClasses;
  report["format"] = "float32";
  const std::vector<double> copy_1 = seconds.at("memcpy_1t");
  const std::vector<double> copy_2 = Faster(copy_1, seconds.at("memcpy_2t"));
  for (int threads : {1, 2}) {
    const auto of = [&](const std::string& name) {
      return seconds.at(absl::StrCat(name, "_", threads, "t"));
    };
    const std::vector<double> torch = Faster(of("libtorch_whole"), of("libtorch_chunks"));
    // On two threads against the better of either memcpy.
    const std::vector<double>& copy = threads == 1 ? copy_1 : copy_2;
    const std::string end = absl::StrCat("_", threads, "t");
    report["vs_libtorch" + end] = MedianRatio(torch, of("probabilities"));
    report["bandwidth_ratio" + end] = MedianRatio(copy, of("probabilities"));
    report["bandwidth_ratio_logits" + end] = MedianRatio(copy, of("logits_t2"));
    report["bandwidth_ratio_logits_t1" + end] = MedianRatio(copy, of("logits_t1"));
  }
  report["bandwidth_ratio_logits"] = report["bandwidth_ratio_logits_1t"];
  report["extra_memory"] = std::max(extra, extra_logits) / (4.0 * kElements);
  report["extra_memory_bytes"] = std::max(extra, extra_logits);
  for (const auto& [name, samples] : seconds) {
    report["milliseconds"][name] = Median(samples) * 1e3;
    report["milliseconds_best"][name] = *std::min_element(samples.begin(), samples.end()) * 1e3;
  }
  report["memcpy_gbps_1t"] = kBytes / Median(copy_1) * 1e-9;
  report["memcpy_gbps_2t_or_1t"] = kBytes / Median(copy_2) * 1e-9;
  report["libtorch"] =
      "log_softmax, nll_loss, (q * log_p).sum() and autograd; faster of the whole "
      "batch and of 32 rows at a time, heap retained";
  report["checked"] = "every gradient element and every row's loss against double precision";
  PrintReport(report);
  return absl::OkStatus();
}

int Main(bool quick) {
  const absl::Status status = Run(quick);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
}
