// What a worker costs beside the arithmetic: examples/s of a job of one shard (core 0) and one
// worker (core 1), over those of bare_loop (core 1), which runs the same archive on the same
// batches with nothing but libtorch. The two take turns; while one computes the other stands still.
// Both must come to the same losses, step by step, or there is no figure.
//
//   ratio       examples/s of the job over those of bare_loop
//   ratio_lag1  the same of the job with training.weights_lag 1, whose losses are its own
//   teacher_wait_fraction   of the steps of the job with a teacher, the archive itself, that a
//               prediction server on core 0 computes: the part in which the training thread waits
//               for it (on_teacher_loss WAIT: every step uses it)
//
//   worker_overhead [--quick] [--only=resnet20|lstm] [--trace=DIR]
//
// --trace: the workers leave traces there (deploy/trace_summary.py).
//
// The last line of the output is a JSON object.

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/bare_process.h"
#include "tests/benchmarks/worker_overhead_jobs.h"
#include "tests/benchmarks/worker_side.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kArmSeconds = 3;  // each turn of either side lasts at least so long
constexpr int kMinArmSteps = 8;
constexpr int kMaxSteps = 600;  // of the text and of bare_loop's batches
// Losses are FP32 sums in another order; over hundreds of steps the difference grows.
constexpr double kLossTolerance = 1e-3;
constexpr int kStrictSteps = 20;
constexpr double kLateLossTolerance = 5e-2;

struct Plan {
  std::string name;
  std::string shapes;
  int chunk_rows = 0;  // also try the loss in pieces of so many rows
  int rounds = 10;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

// The fastest way to write the baseline, found by trying.
absl::StatusOr<BareProcess::Options> FastestBaseline(BareProcess::Options options,
                                                     const std::vector<int>& chunk_rows,
                                                     double* step_seconds) {
  BareProcess::Options best;
  *step_seconds = INFINITY;
  for (const int chunk : chunk_rows) {
    for (const bool optimize : {false, true}) {
      options.chunk_rows = chunk;
      options.optimize_graph = optimize;
      options.batches = 16;
      CODISTILL_ASSIGN_OR_RETURN(const auto process, BareProcess::Start(options));
      // The JIT's optimisation needs passes to learn from.
      CODISTILL_RETURN_IF_ERROR(process->Run(6));
      CODISTILL_ASSIGN_OR_RETURN(const BareProcess::Result result, process->Run(10));
      std::printf("baseline, loss by %s, graph optimisation %s: %.4f s a step\n",
                  chunk == 0 ? "whole batch" : absl::StrCat(chunk, " rows").c_str(),
                  optimize ? "on" : "off", result.seconds / 10);
      if (result.seconds / 10 < *step_seconds) {
        *step_seconds = result.seconds / 10;
        best = options;
      }
    }
  }
  best.batches = kMaxSteps;
  return best;
}

// Largest relative difference of any step's loss: the first steps, all steps, and how far it fell.
absl::StatusOr<Json> CompareLosses(const std::map<int64_t, double>& worker,
                                   const std::vector<double>& bare) {
  double early = 0, all = 0;
  int compared = 0;
  for (size_t i = 0; i < bare.size(); ++i) {
    const auto it = worker.find(i + 1);
    if (it == worker.end()) continue;
    ++compared;
    const double difference = std::abs(it->second - bare[i]) / std::abs(bare[i]);
    if (!(difference <= kLateLossTolerance)) {
      return absl::InternalError(absl::StrCat("loss of step ", i + 1, ": worker ", it->second,
                                              ", bare libtorch ", bare[i]));
    }
    if (i < kStrictSteps) early = std::max(early, difference);
    all = std::max(all, difference);
  }
  if (compared < kStrictSteps || !(early <= kLossTolerance)) {
    return absl::InternalError(
        absl::StrCat(compared, " steps compared; the first ", kStrictSteps, " differ by ", early));
  }
  const double fall = 1 - bare[compared - 1] / bare[0];
  if (!(fall > 0.01 && fall > 10 * all)) {
    return absl::InternalError(
        absl::StrCat("the loss went from ", bare[0], " to ", bare[compared - 1], ": no training"));
  }
  Json json;
  json["steps_compared"] = compared;
  json["first_loss"] = bare[0];
  json["last_loss"] = bare[compared - 1];
  json["relative_difference_first_steps"] = early;
  json["relative_difference_all_steps"] = all;
  return json;
}

// `job` with weights that are a step older.
JobConfig Lagging(JobConfig job) {
  job.set_name(job.name() + "-lag1");
  job.mutable_training()->set_weights_lag(1);
  return job;
}

// `job` with the model it begins with as its teacher, at a prediction server.
absl::StatusOr<JobConfig> Taught(JobConfig job) {
  CODISTILL_RETURN_IF_ERROR(ExportArchives(&job));
  job.set_name(job.name() + "-taught");
  TeacherConfig* teacher = job.add_teachers();
  teacher->set_name("frozen");
  teacher->mutable_frozen()->set_archive(ArchivePath(job, 0));
  job.mutable_groups(0)->add_teachers("frozen");
  job.mutable_codistillation()->set_enabled(true);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::WAIT);
  return job;
}

// Teachers are waited for so long, as a part of the steps' time.
absl::StatusOr<Json> MeasureTeacher(const Plan& plan, const JobConfig& job, int steps,
                                    const std::string& data_dir, const std::string& trace) {
  CODISTILL_ASSIGN_OR_RETURN(const JobConfig with, Taught(job));
  WorkerSide taught(with);
  if (!trace.empty()) taught.AddWorkerFlags({"--trace=" + trace + "/" + with.name() + ".json"});
  CODISTILL_RETURN_IF_ERROR(taught.Start(data_dir));
  std::vector<double> fractions, rates;
  for (int round = 0; round < std::min(plan.rounds, 5); ++round) {
    CODISTILL_ASSIGN_OR_RETURN(const WorkerSide::ThreadSeconds before, taught.Seconds());
    CODISTILL_ASSIGN_OR_RETURN(const Turn turn, taught.Run(steps));
    CODISTILL_ASSIGN_OR_RETURN(const WorkerSide::ThreadSeconds after, taught.Seconds());
    // What was not asked for ahead of need when the pause ended is in it too, spread over all steps
    // of the turn.
    fractions.push_back((after.teacher - before.teacher) / turn.seconds);
    rates.push_back(steps * job.training().batch_size() / turn.seconds);
    std::printf("%s with a teacher, round %d: %.1f examples/s, %.4f of the time waiting for it\n",
                plan.name.c_str(), round + 1, rates.back(), fractions.back());
    std::fflush(stdout);
  }
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters counters, taught.Counters());
  if (counters.teacher_skipped_steps() > 0 || counters.teacher_failures() > 0 ||
      counters.teacher_used_steps() < static_cast<int64_t>(steps)) {
    return absl::InternalError(absl::StrCat(counters.teacher_skipped_steps(),
                                            " steps without their teacher, ",
                                            counters.teacher_failures(), " failures"));
  }
  if (!trace.empty()) CODISTILL_RETURN_IF_ERROR(taught.End());
  Json json;
  json["teacher_wait_fraction"] = Median(fractions);
  json["teacher_wait_fractions"] = fractions;
  json["taught_examples_per_second"] = Median(rates);
  json["teacher_used_steps"] = counters.teacher_used_steps();
  return json;
}

absl::StatusOr<Json> Measure(const Plan& plan, const JobConfig& job, const std::string& data_dir,
                             const std::string& bare_binary, const std::string& trace) {
  WorkerSide worker(job), lagging(Lagging(job));
  if (!trace.empty()) {
    worker.AddWorkerFlags({"--trace=" + trace + "/" + job.name() + ".json"});
    lagging.AddWorkerFlags({"--trace=" + trace + "/" + job.name() + "-lag1.json"});
  }
  CODISTILL_RETURN_IF_ERROR(worker.Start(data_dir));
  CODISTILL_RETURN_IF_ERROR(lagging.Start(data_dir));
  BareProcess::Options options;
  options.binary = bare_binary;
  options.core = kWorkerCore;
  options.job = worker.job_file();
  options.data_dir = data_dir;
  std::vector<int> chunk_rows = {0};
  if (plan.chunk_rows > 0) chunk_rows.push_back(plan.chunk_rows);
  double step_seconds = 0;
  CODISTILL_ASSIGN_OR_RETURN(options, FastestBaseline(options, chunk_rows, &step_seconds));
  CODISTILL_ASSIGN_OR_RETURN(const auto bare, BareProcess::Start(options));
  const int limit = kMaxSteps / plan.rounds - kWarmSteps - 8;
  const int steps =
      std::min(limit, std::max(kMinArmSteps, static_cast<int>(kArmSeconds / step_seconds)));

  std::vector<double> bare_losses;
  const auto run_bare = [&](int n) -> absl::StatusOr<Turn> {
    CODISTILL_ASSIGN_OR_RETURN(const BareProcess::Result result, bare->Run(n));
    bare_losses.insert(bare_losses.end(), result.losses.begin(), result.losses.end());
    return Turn{result.seconds, result.processor_seconds / n};
  };
  // As many as the other side has done by now; the JIT learns from the first ones.
  CODISTILL_RETURN_IF_ERROR(run_bare(2 * kWarmSteps));

  const double examples = static_cast<double>(steps) * job.training().batch_size();
  std::vector<double> ratios, worker_rates, bare_rates, worker_processor, bare_processor;
  std::vector<double> lag_ratios, lag_rates;
  for (int round = 0; round < plan.rounds; ++round) {
    Turn turns[3];  // worker, bare, worker with lag
    for (int turn = 0; turn < 3; ++turn) {
      const int whose = (turn + round) % 3;
      absl::StatusOr<Turn> spent = absl::UnknownError("");
      if (whose == 1) {
        CODISTILL_RETURN_IF_ERROR(run_bare(kWarmSteps));
        spent = run_bare(steps);
      } else {
        spent = (whose == 0 ? worker : lagging).Run(steps);
      }
      CODISTILL_RETURN_IF_ERROR(spent.status());
      turns[whose] = *spent;
    }
    worker_rates.push_back(examples / turns[0].seconds);
    bare_rates.push_back(examples / turns[1].seconds);
    worker_processor.push_back(turns[0].processor_seconds_a_step);
    bare_processor.push_back(turns[1].processor_seconds_a_step);
    ratios.push_back(worker_rates.back() / bare_rates.back());
    lag_rates.push_back(examples / turns[2].seconds);
    lag_ratios.push_back(lag_rates.back() / bare_rates.back());
    std::printf("%s round %d: worker %.1f examples/s, bare %.1f, ratio %.4f; with lag %.1f, %.4f\n",
                plan.name.c_str(), round + 1, worker_rates.back(), bare_rates.back(), ratios.back(),
                lag_rates.back(), lag_ratios.back());
    std::printf("  processor seconds a step: worker %.4f, bare %.4f\n", worker_processor.back(),
                bare_processor.back());
    std::fflush(stdout);
  }
  Json json;
  json["model"] = plan.name;
  json["shapes"] = plan.shapes;
  json["ratio"] = Median(ratios);
  json["ratios"] = ratios;
  json["ratio_lag1"] = Median(lag_ratios);
  json["ratios_lag1"] = lag_ratios;
  json["worker_lag1_examples_per_second"] = Median(lag_rates);
  json["worker_examples_per_second"] = Median(worker_rates);
  json["bare_examples_per_second"] = Median(bare_rates);
  json["worker_processor_seconds_a_step"] = Median(worker_processor);
  json["bare_processor_seconds_a_step"] = Median(bare_processor);
  json["steps_a_turn"] = steps;
  json["baseline_loss_rows_at_a_time"] = options.chunk_rows;  // 0 = the whole batch
  json["baseline_graph_optimisation"] = options.optimize_graph;
  CODISTILL_ASSIGN_OR_RETURN(json["verified"], CompareLosses(worker.losses(), bare_losses));
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters counters, worker.Counters());
  json["worker_compute_seconds"] = counters.compute_seconds();
  json["worker_wait_seconds"] = counters.wait_seconds();
  if (!trace.empty()) {
    CODISTILL_RETURN_IF_ERROR(worker.End());
    CODISTILL_RETURN_IF_ERROR(lagging.End());
  }
  CODISTILL_ASSIGN_OR_RETURN(json["teacher"], MeasureTeacher(plan, job, steps, data_dir, trace));
  return json;
}

std::string CpuModel() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (absl::StartsWith(line, "model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

absl::StatusOr<Json> Benchmark(bool quick, const std::string& only, const std::string& trace) {
  const std::string bare_binary = RunfilesPath("tests/benchmarks/bare_loop");
  const int rounds = quick ? 3 : 10;
  Json out;
  out["benchmark"] = "worker_overhead";
  out["ratio"] = out["ratio_lag1"] = INFINITY;
  out["teacher_wait_fraction"] = 0.0;
  const auto add = [&out](const std::string& key, const Json& json) {
    out[key] = json;
    for (const std::string ratio : {"ratio", "ratio_lag1"}) {
      out[ratio + "_" + key] = json[ratio];
      out[ratio] = std::min(out[ratio].get<double>(), json[ratio].get<double>());
    }
    const double waits = json["teacher"]["teacher_wait_fraction"];
    out["teacher_wait_fraction_" + key] = waits;
    out["teacher_wait_fraction"] = std::max(out["teacher_wait_fraction"].get<double>(), waits);
  };
  if (only.empty() || only == "resnet20") {
    const std::string images = NewDirectory("images");
    CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, ResNet20Job(images));
    CODISTILL_ASSIGN_OR_RETURN(
        const Json json, Measure({"ResNet-20", "batch 64, images 3x32x32, 10 classes", 0, rounds},
                                 job, images, bare_binary, trace));
    add("resnet20", json);
  }
  if (only.empty() || only == "lstm") {
    const std::string text = NewDirectory("text");
    CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, LstmJob(text, kMaxSteps));
    CODISTILL_ASSIGN_OR_RETURN(
        const Json json,
        Measure(
            {"LSTM 2x256", "32 lanes x 32 tokens, 13777 words, embedding 256 (tied)", 32, rounds},
            job, text, bare_binary, trace));
    add("lstm", json);
  }
  out["threads"] = 1;
  out["pinning"] = absl::StrCat("shard and prediction server on core ", kServerCore,
                                "; worker and bare loop on core ", kWorkerCore);
  out["rounds"] = rounds;
  out["machine"] = {{"cpu", CpuModel()}, {"cores", std::thread::hardware_concurrency()}};
  return out;
}

int Main(int argc, char** argv) {
  bool quick = false;
  std::string only, trace;
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (argument == "--quick") {
      quick = true;
    } else if (absl::ConsumePrefix(&argument, "--only=") &&
               (argument == "resnet20" || argument == "lstm")) {
      only = std::string(argument);
    } else if (absl::ConsumePrefix(&argument, "--trace=")) {
      trace = std::string(argument);
    } else {
      std::fprintf(stderr,
                   "usage: worker_overhead [--quick] [--only=resnet20|lstm] [--trace=DIR]\n");
      return 2;
    }
  }
  if (std::thread::hardware_concurrency() < 2) {
    std::fprintf(stderr, "worker_overhead: needs two cores, one for the shard, one to measure\n");
    return 1;
  }
  // Whoever watches must not take time from whom is watched.
  cpu_set_t core;
  CPU_ZERO(&core);
  CPU_SET(kServerCore, &core);
  if (sched_setaffinity(0, sizeof(core), &core) != 0) {
    std::fprintf(stderr, "worker_overhead: cannot stay on core %d\n", kServerCore);
    return 1;
  }
  const absl::StatusOr<Json> result = Benchmark(quick, only, trace);
  if (!result.ok()) {
    std::fprintf(stderr, "worker_overhead: %s\n", result.status().ToString().c_str());
    return 1;
  }
  std::printf("%s\n", result->dump().c_str());
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
