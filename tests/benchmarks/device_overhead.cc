// worker_overhead and teacher_overhead where passes are computed on a device: a ResNet-50 in
// bfloat16, one shard on the CPU, tensors through shared memory.
//
//   device_overhead --device=cuda:0 [--quick] [--rounds=N] [--batch=256] [--side=224]
//
// In pairs that take turns, each in processes of its own; while one computes the other stands
// still:
//   sync_loss       1 - examples/s of a worker / of bare_loop (libtorch alone), SYNC
//   lag_loss        the same with training.weights_lag 1
//   exposed_ms      what a step of either takes longer than bare_loop's
//   server_teacher  1 - examples/s with answers of a server on the CPU (fp32 logits) / without
//   local_teacher   seconds of a step with a teacher on the same device (CHECKPOINTS, bfloat16)
//   over
//                   those of one without
//
// Losses must be finite and fall, or there is no figure. The last line of the output is a JSON
// object.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/device.h"
#include "common/base/status.h"
#include "common/model/test_archive.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/bare_process.h"
#include "tests/benchmarks/canned_server.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/pinned_process.h"
#include "tests/benchmarks/worker_overhead_jobs.h"
#include "tests/benchmarks/worker_side.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kBareBatches = 8;  // taken again and again
constexpr double kTurnSeconds = 4;
constexpr int kMinTurnSteps = 5;

struct Plan {
  std::string device;
  int rounds = 10;
  int batch = 256;
  int side = 224;
};

// Runs so many steps and says how long they took.
using Arm = std::function<absl::StatusOr<double>(int steps)>;

struct Pair {
  std::vector<double> first, second;  // seconds a step, by round
};

absl::StatusOr<Pair> TakeTurns(const std::string& name, int rounds, const Arm& first,
                               const Arm& second) {
  CODISTILL_ASSIGN_OR_RETURN(const double once, first(kMinTurnSteps));
  const int steps = std::max(kMinTurnSteps, static_cast<int>(kTurnSeconds * kMinTurnSteps / once));
  Pair pair;
  for (int round = 0; round < rounds; ++round) {
    for (int turn = 0; turn < 2; ++turn) {
      const bool firsts = (turn == 0) == (round % 2 == 0);
      CODISTILL_ASSIGN_OR_RETURN(const double seconds, (firsts ? first : second)(steps));
      (firsts ? pair.first : pair.second).push_back(seconds / steps);
    }
    std::printf("%s round %d: %.2f ms and %.2f ms a step\n", name.c_str(), round + 1,
                1e3 * pair.first.back(), 1e3 * pair.second.back());
    std::fflush(stdout);
  }
  return pair;
}

Arm ArmOf(WorkerSide* side) {
  return [side](int steps) -> absl::StatusOr<double> {
    CODISTILL_ASSIGN_OR_RETURN(const Turn turn, side->Run(steps));
    return turn.seconds;
  };
}

// A job that trains learns; one whose numbers are wrong does not. What a few batches teach is lost
// in their noise.
absl::Status CheckLosses(const std::string& name, const Plan& plan, const WorkerSide& side) {
  constexpr size_t kExamples = 10000;
  const auto& losses = side.losses();
  std::vector<double> values;
  for (const auto& [step, loss] : losses) {
    if (!std::isfinite(loss)) {
      return absl::InternalError(absl::StrCat(name, ": the loss of step ", step, " is ", loss));
    }
  }
  for (const auto& [step, loss] : losses) values.push_back(loss);
  const auto quarter = static_cast<std::ptrdiff_t>(values.size() / 4);
  if (values.size() * static_cast<size_t>(plan.batch) < kExamples || quarter == 0) {
    return absl::OkStatus();
  }
  const double first = Median({values.begin(), values.begin() + quarter});
  const double last = Median({values.end() - quarter, values.end()});
  if (!(last < first)) {
    return absl::InternalError(
        absl::StrCat(name, ": the loss does not fall, from ", first, " to ", last));
  }
  return absl::OkStatus();
}

JobConfig Lagging(JobConfig job) {
  job.set_name(job.name() + "-lag");
  job.mutable_training()->set_weights_lag(1);
  return job;
}

absl::StatusOr<Json> AgainstBare(const std::string& name, const Plan& plan, const JobConfig& job,
                                 const std::string& data_dir) {
  WorkerSide worker(job, /*pinned=*/false);
  CODISTILL_RETURN_IF_ERROR(worker.Start(data_dir));
  BareProcess::Options options;
  options.binary = RunfilesPath("tests/benchmarks/bare_loop");
  options.core = kAnyCore;
  options.job = worker.job_file();
  options.data_dir = data_dir;
  options.batches = kBareBatches;
  options.device = plan.device;
  CODISTILL_ASSIGN_OR_RETURN(const auto bare, BareProcess::Start(options));
  const Arm bare_arm = [&bare](int steps) -> absl::StatusOr<double> {
    CODISTILL_RETURN_IF_ERROR(bare->Run(kWarmSteps).status());
    CODISTILL_ASSIGN_OR_RETURN(const BareProcess::Result result, bare->Run(steps));
    for (const double loss : result.losses) {
      if (!std::isfinite(loss)) return absl::InternalError("the bare loop's loss is not finite");
    }
    return result.seconds;
  };
  CODISTILL_ASSIGN_OR_RETURN(const Pair pair,
                             TakeTurns(name, plan.rounds, bare_arm, ArmOf(&worker)));
  CODISTILL_RETURN_IF_ERROR(CheckLosses(name, plan, worker));
  Json json;
  json["loss"] = 1 - MedianRatio(pair.first, pair.second);
  json["exposed_ms"] = 1e3 * (Median(pair.second) - Median(pair.first));
  json["bare_ms_a_step"] = 1e3 * Median(pair.first);
  json["worker_ms_a_step"] = 1e3 * Median(pair.second);
  json["examples_per_second"] = plan.batch / Median(pair.second);
  json["bare_examples_per_second"] = plan.batch / Median(pair.first);
  return json;
}

absl::StatusOr<Json> AgainstAlone(const std::string& name, const Plan& plan, const JobConfig& job,
                                  const JobConfig& taught_job, const std::string& data_dir) {
  WorkerSide alone(job, /*pinned=*/false), taught(taught_job, /*pinned=*/false);
  CODISTILL_RETURN_IF_ERROR(alone.Start(data_dir));
  CODISTILL_RETURN_IF_ERROR(taught.Start(data_dir));
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters before, taught.Counters());
  CODISTILL_ASSIGN_OR_RETURN(const Pair pair,
                             TakeTurns(name, plan.rounds, ArmOf(&alone), ArmOf(&taught)));
  CODISTILL_RETURN_IF_ERROR(CheckLosses(name, plan, taught));
  CODISTILL_ASSIGN_OR_RETURN(const WorkerCounters after, taught.Counters());
  const int64_t used = after.teacher_used_steps() - before.teacher_used_steps();
  const int64_t missed = after.teacher_skipped_steps() - before.teacher_skipped_steps();
  if (used < int64_t{plan.rounds} * kMinTurnSteps || missed > 2 * plan.rounds) {
    return absl::InternalError(
        absl::StrCat(name, ": ", used, " steps used the teacher and ", missed, " did not"));
  }
  Json json;
  json["cost"] = 1 - MedianRatio(pair.first, pair.second);
  json["step_ratio"] = MedianRatio(pair.second, pair.first);
  json["alone_ms_a_step"] = 1e3 * Median(pair.first);
  json["taught_ms_a_step"] = 1e3 * Median(pair.second);
  json["used_steps"] = used;
  json["missed_steps"] = missed;
  return json;
}

absl::StatusOr<Json> Benchmark(const Plan& plan) {
  Json out = NewReport("device_overhead", plan.rounds, "nothing is pinned");
  out["device"] = plan.device;
  out["model"] = "ResNet-50, bfloat16";
  out["shapes"] =
      absl::StrCat("batch ", plan.batch, ", images 3x", plan.side, "x", plan.side, ", 10 classes");
  const std::string images = NewDirectory("images");
  CODISTILL_ASSIGN_OR_RETURN(const JobConfig job,
                             ResNet50Job(images, plan.side, plan.batch, plan.device));
  const JobConfig lagging = Lagging(job);
  CODISTILL_ASSIGN_OR_RETURN(const Json sync, AgainstBare("SYNC", plan, job, images));
  out["sync"] = sync;
  CODISTILL_ASSIGN_OR_RETURN(const Json lag, AgainstBare("weights_lag 1", plan, lagging, images));
  out["lag"] = lag;

  CODISTILL_ASSIGN_OR_RETURN(
      const auto server,
      CannedServer::Start(absl::StrCat("logits:", plan.batch, ",10"), 0, kAnyCore));
  CODISTILL_ASSIGN_OR_RETURN(const Json from_server,
                             AgainstAlone("teacher of a server", plan, lagging,
                                          Taught(lagging, "server", server->address()), images));
  out["server_teacher"] = from_server;

  JobConfig local = lagging;
  local.set_name("resnet50-local");
  TeacherConfig* const teacher = local.add_teachers();
  teacher->set_name("frozen");
  teacher->mutable_frozen()->set_archive(
      ExportForTest("teacher", "resnet", {"layout=large", "depth=50", "num_classes=10"}, 2) +
      "/teacher.pt");
  local.mutable_prediction()->set_precision(BF16);
  local.mutable_codistillation()->set_enabled(true);
  local.mutable_codistillation()->set_mode(CodistillationConfig::CHECKPOINTS);
  CODISTILL_ASSIGN_OR_RETURN(const Json on_device,
                             AgainstAlone("teacher on the device", plan, lagging, local, images));
  out["local_teacher"] = on_device;

  out["sync_loss"] = sync["loss"];
  out["lag_loss"] = lag["loss"];
  out["sync_exposed_ms"] = sync["exposed_ms"];
  out["lag_exposed_ms"] = lag["exposed_ms"];
  out["server_teacher_cost"] = from_server["cost"];
  out["local_teacher_step_ratio"] = on_device["step_ratio"];
  return out;
}

int Main(int argc, char** argv) {
  Plan plan;
  bool good = true;
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    if (argument == "--quick") {
      plan.rounds = 3;
    } else if (absl::ConsumePrefix(&argument, "--device=")) {
      plan.device = std::string(argument);
    } else if (absl::ConsumePrefix(&argument, "--rounds=")) {
      good &= absl::SimpleAtoi(argument, &plan.rounds) && plan.rounds > 0;
    } else if (absl::ConsumePrefix(&argument, "--batch=")) {
      good &= absl::SimpleAtoi(argument, &plan.batch) && plan.batch > 1;
    } else if (absl::ConsumePrefix(&argument, "--side=")) {
      good &= absl::SimpleAtoi(argument, &plan.side) && plan.side >= 32;
    } else {
      good = false;
    }
  }
  if (!good || !ParseDevice(plan.device).ok()) {
    std::fprintf(stderr,
                 "usage: device_overhead --device=cuda:N [--quick] [--rounds=N] [--batch=N] "
                 "[--side=N]\n");
    return 2;
  }
  const absl::StatusOr<Json> result = Benchmark(plan);
  if (!result.ok()) {
    std::fprintf(stderr, "device_overhead: %s\n", result.status().ToString().c_str());
    return 1;
  }
  PrintReport(*result);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) { return codistill::Main(argc, argv); }
