// What teachers cost a student: asking them, and psi, whose arithmetic is part of the figure.
//
//   teacher_overhead [--quick] [--only=resnet20|lstm] [--rounds=N]
//
// One worker on core 1 and its shard on core 0 train without a teacher, with one elsewhere (a
// server on core 0 that answers at once, from bytes made once:
// tests/benchmarks/canned_inference_server.cc), and with one that sleeps for twenty of the
// student's steps before it answers, under SKIP. The three jobs take turns; while one trains the
// others stand still.
//
//   teacher_overhead   1 - (steps/s with the teacher elsewhere) / (steps/s without); its
//                      predictions are used at every step
//   slow_teacher_cost  1 - (steps/s with the slow one) / (steps/s without); never used
//
// ResNet-20 at batch 64 and the LSTM of tests/benchmarks/worker_overhead. The last line of the
// output is a JSON object.

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/canned_server.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/worker_overhead_jobs.h"
#include "tests/benchmarks/worker_side.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kTurnSeconds = 2;
constexpr int kMinTurnSteps = 5;
constexpr int kMaxSteps = 600;     // of the text
constexpr double kSlowSteps = 20;  // how many of the student's steps the slow teacher takes

struct Plan {
  std::string name;
  std::string shapes;
  std::string outputs;  // of the canned answers
  int rounds = 10;
};

absl::StatusOr<Json> Measure(const Plan& plan, const JobConfig& job, const std::string& data_dir) {
  WorkerSide alone(job);
  CODISTILL_RETURN_IF_ERROR(alone.Start(data_dir));
  CODISTILL_ASSIGN_OR_RETURN(const Turn first, alone.Run(kMinTurnSteps));
  const double step_seconds = first.seconds / kMinTurnSteps;
  CODISTILL_ASSIGN_OR_RETURN(const auto fast_server,
                             CannedServer::Start(plan.outputs, 0, kServerCore));
  CODISTILL_ASSIGN_OR_RETURN(
      const auto slow_server,
      CannedServer::Start(plan.outputs, kSlowSteps * step_seconds, kServerCore));
  WorkerSide taught(Taught(job, "taught", fast_server->address()));
  CODISTILL_RETURN_IF_ERROR(taught.Start(data_dir));
  WorkerSide ignored(Taught(job, "ignored", slow_server->address()));
  CODISTILL_RETURN_IF_ERROR(ignored.Start(data_dir));
  const int limit = std::max(kMinTurnSteps, kMaxSteps / plan.rounds - kWarmSteps - 8);
  const int steps =
      std::min(limit, std::max(kMinTurnSteps, static_cast<int>(kTurnSeconds / step_seconds)));

  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters taught_before, taught.Counters());
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters ignored_before, ignored.Counters());
  WorkerSide* const sides[] = {&alone, &taught, &ignored};
  std::vector<double> rates[3], processor[3];
  for (int round = 0; round < plan.rounds; ++round) {
    for (int turn = 0; turn < 3; ++turn) {
      const int side = (round + turn) % 3;
      CODISTILL_ASSIGN_OR_RETURN(const Turn spent, sides[side]->Run(steps));
      rates[side].push_back(steps / spent.seconds);
      processor[side].push_back(spent.processor_seconds_a_step);
    }
    std::printf("%s round %d: steps/s without %.3f, with a teacher %.3f (%.4f), slow %.3f (%.4f)\n",
                plan.name.c_str(), round + 1, rates[0].back(), rates[1].back(),
                1 - rates[1].back() / rates[0].back(), rates[2].back(),
                1 - rates[2].back() / rates[0].back());
    std::printf("  processor seconds a step: %.4f, %.4f, %.4f\n", processor[0].back(),
                processor[1].back(), processor[2].back());
    std::fflush(stdout);
  }

  // Every step of the one had its predictions, none of the other.
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters with, taught.Counters());
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters slow, ignored.Counters());
  const int64_t used = with.teacher_used_steps() - taught_before.teacher_used_steps();
  const int64_t missed = with.teacher_skipped_steps() - taught_before.teacher_skipped_steps();
  const int64_t skipped = slow.teacher_skipped_steps() - ignored_before.teacher_skipped_steps();
  // A few are lost where a turn begins: nothing was prefetched while it stood still.
  if (used < static_cast<int64_t>(steps) * plan.rounds || missed > 2 * plan.rounds ||
      with.teacher_failures() > 0) {
    return absl::InternalError(absl::StrCat("with a teacher: ", used, " steps used it, ", missed,
                                            " did not, ", with.teacher_failures(), " failures"));
  }
  if (slow.teacher_used_steps() > 0 || slow.teacher_failures() > 0 ||
      skipped < static_cast<int64_t>(steps) * plan.rounds) {
    return absl::InternalError(absl::StrCat("with a slow teacher: ", slow.teacher_used_steps(),
                                            " steps used it, ", skipped, " did not"));
  }
  Json json;
  json["model"] = plan.name;
  json["shapes"] = plan.shapes;
  json["teacher_overhead"] = 1 - MedianRatio(rates[1], rates[0]);
  json["slow_teacher_cost"] = 1 - MedianRatio(rates[2], rates[0]);
  json["steps_per_second"] = Median(rates[0]);
  json["steps_per_second_with_teacher"] = Median(rates[1]);
  json["steps_per_second_with_slow_teacher"] = Median(rates[2]);
  json["processor_seconds_a_step"] = Median(processor[0]);
  json["processor_seconds_a_step_with_teacher"] = Median(processor[1]);
  json["processor_seconds_a_step_with_slow_teacher"] = Median(processor[2]);
  json["slow_teacher_sleeps_seconds"] = kSlowSteps * step_seconds;
  json["steps_a_turn"] = steps;
  json["verified"] = {{"used_steps", used},
                      {"missed_steps", missed},
                      {"slow_used_steps", slow.teacher_used_steps()},
                      {"slow_skipped_steps", skipped},
                      {"slow_late_questions", slow.teacher_late()}};
  return json;
}

absl::StatusOr<Json> Benchmark(int rounds, const std::string& only) {
  Json out = NewReport(
      "teacher_overhead", rounds,
      absl::StrCat("shard and teacher on core ", kServerCore, ", worker on core ", kWorkerCore));
  out["teacher_overhead"] = 0;
  out["slow_teacher_cost"] = 0;
  out["threads"] = 1;
  double overhead = -INFINITY, cost = -INFINITY;
  const auto add = [&](const std::string& key, const Json& json) {
    out[key] = json;
    out["teacher_overhead_" + key] = json["teacher_overhead"];
    out["slow_teacher_cost_" + key] = json["slow_teacher_cost"];
    overhead = std::max(overhead, json["teacher_overhead"].get<double>());
    cost = std::max(cost, json["slow_teacher_cost"].get<double>());
  };
  if (only.empty() || only == "resnet20") {
    const std::string images = NewDirectory("images");
    CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, ResNet20Job(images));
    CODISTILL_ASSIGN_OR_RETURN(
        const Json json,
        Measure({"ResNet-20", "batch 64, images 3x32x32, 10 classes", "logits:64,10", rounds}, job,
                images));
    add("resnet20", json);
  }
  if (only.empty() || only == "lstm") {
    const std::string text = NewDirectory("text");
    CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, LstmJob(text, kMaxSteps));
    CODISTILL_ASSIGN_OR_RETURN(
        const Json json,
        Measure({"LSTM 2x256", "32 lanes x 32 tokens, 13777 words, embedding 256 (tied)",
                 "logits:1024,13777;h:2,32,256;c:2,32,256", rounds},
                job, text));
    add("lstm", json);
  }
  out["teacher_overhead"] = overhead;  // the worse of the two
  out["slow_teacher_cost"] = cost;
  return out;
}

int Main(int argc, char** argv) {
  int rounds = 10;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (argument == "--quick") {
      rounds = 3;
    } else if (absl::ConsumePrefix(&argument, "--rounds=") && absl::SimpleAtoi(argument, &rounds) &&
               rounds > 0) {
      continue;
    } else if (absl::ConsumePrefix(&argument, "--only=")) {
      only = std::string(argument);
    } else {
      std::fprintf(stderr,
                   "usage: teacher_overhead [--quick] [--only=resnet20|lstm] [--rounds=N]\n");
      return 2;
    }
  }
  if (std::thread::hardware_concurrency() < 2) {
    std::fprintf(stderr, "teacher_overhead: needs two cores\n");
    return 1;
  }
  // Whoever watches must not take time from whom is watched.
  absl::Status status = PinToCore(kServerCore);
  if (status.ok()) {
    const absl::StatusOr<Json> result = Benchmark(rounds, only);
    if (result.ok()) {
      PrintReport(*result);
      return 0;
    }
    status = result.status();
  }
  std::fprintf(stderr, "teacher_overhead: %s\n", status.ToString().c_str());
  return 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
