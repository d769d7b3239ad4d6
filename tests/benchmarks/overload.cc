// A prediction server that is offered four times what it can do.
//
//   overload [--quick]
//
// The server has one compute thread on core 0 and serves an MLP 1024-8192-8192-1000; every call
// brings 4 examples. Its capacity is measured in a closed loop, before and after; in between calls
// come in an open loop from 16 clients on core 1, at four times the capacity, for 60 s (--quick:
// 10).
//
//   goodput_ratio     right answers a second under overload, of the capacity
//   refusal_cpu_us    processor time of the server for one refused call, where refused calls come
//                     again at once, thousands a second, and hardly anything else happens: of its
//                     threads but the computing ones, less what accepted calls cost at capacity
//   refusal_cpu_us_at_4x   the same under the overload: calls are so far apart that each pays for
//                     waking gRPC's threads on a core that computes; so does every other call:
//   empty_call_cpu_us      of ServerLive, as often as calls were refused, beside calls at capacity
//   memory_growth     of the server's resident memory, from the second to the last tenth
//
// Every answer is compared with that of an idle server, and every refusal must say when to come
// again. The last line of the output is a JSON object.

#include <dirent.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "control/child_process.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/inference_load.h"
#include "tests/benchmarks/server_group.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kServerCore = 0;
constexpr int kClientCore = 1;
constexpr int64_t kInputs = 1024;
constexpr int64_t kClasses = 1000;
constexpr int64_t kExamples = 4;  // of a call
constexpr int kBatches = 8;       // different ones
constexpr int kMaxBatch = 64;     // examples of a pass
constexpr int kConnections = 16;
constexpr int kOutstanding = 96;  // closed loop: six passes' worth, less than the queue holds
constexpr double kFactor = 4;
constexpr double kMostCapacity = 500;  // calls a second
constexpr int kFlood =
    1024;  // closed loop: four times what the queue holds, so that most are refused

absl::StatusOr<JobConfig> MakeJob() {
  JobConfig job = MlpJob("overload", 1);
  ModelConfig* model = job.mutable_model();
  for (auto& option : *model->mutable_export_()->mutable_options()) {
    if (option.key() == "in_features") option.set_value(absl::StrCat(kInputs));
    if (option.key() == "hidden") option.set_value("8192,8192");
    if (option.key() == "num_classes") option.set_value(absl::StrCat(kClasses));
  }
  model->mutable_inputs(0)->set_shape(0, kInputs);
  model->set_num_outputs(kClasses);
  for (auto* data :
       {job.mutable_data()->mutable_train(), job.mutable_data()->mutable_validation()}) {
    data->mutable_synthetic()->set_inputs(kInputs);  // which nobody reads
    data->mutable_synthetic()->set_classes(kClasses);
  }
  job.mutable_prediction()->set_max_batch_size(kMaxBatch);
  CODISTILL_RETURN_IF_ERROR(ExportArchives(&job));
  return job;
}

// Nanoseconds of processor time of a process' threads so far: those that compute, and the others.
struct Processor {
  double compute = 0;
  double other = 0;
};

Processor ProcessorOf(pid_t pid) {
  Processor sum;
  const std::string tasks = absl::StrCat("/proc/", pid, "/task");
  DIR* const directory = opendir(tasks.c_str());
  if (directory == nullptr) return sum;
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_name[0] == '.') continue;
    std::string name;
    double nanoseconds = 0;
    std::ifstream(absl::StrCat(tasks, "/", entry->d_name, "/comm")) >> name;
    std::ifstream(absl::StrCat(tasks, "/", entry->d_name, "/schedstat")) >> nanoseconds;
    (absl::StartsWith(name, "compute") ? sum.compute : sum.other) += nanoseconds * 1e-9;
  }
  closedir(directory);
  return sum;
}

double ResidentMiB(pid_t pid) {
  double pages = 0, resident = 0;
  std::ifstream(absl::StrCat("/proc/", pid, "/statm")) >> pages >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE)) / (1 << 20);
}

class Server {
 public:
  static absl::StatusOr<std::unique_ptr<Server>> Start(const JobConfig& job) {
    const std::string directory = NewDirectory("server");
    const std::string path = JoinPath(directory, "job.textproto");
    CODISTILL_RETURN_IF_ERROR(SaveJob(job, path));
    const std::string ready = JoinPath(directory, "ready.json");
    auto server = std::make_unique<Server>();
    CODISTILL_ASSIGN_OR_RETURN(
        server->process_,
        StartPinned({RunfilesBinaries().prediction_server, absl::StrCat("--job=", path),
                     absl::StrCat("--archive=", ArchivePath(job, 0)), "--name=mlp",
                     "--compute_threads=1", "--port=0", absl::StrCat("--ready_file=", ready)},
                    ready, kServerCore, kClientCore));
    CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(ready, 1 << 16));
    server->address_ = nlohmann::json::parse(text).value("address", "");
    return server;
  }
  ~Server() {
    process_.Signal(SIGKILL);
    while (process_.running() && !process_.Poll()) absl::SleepFor(absl::Milliseconds(5));
  }
  const std::string& address() const { return address_; }
  pid_t pid() const { return process_.pid(); }

 private:
  ChildProcess process_;
  std::string address_;
};

// Reads the server's memory ten times a second while it lives.
class MemoryWatch {
 public:
  explicit MemoryWatch(pid_t pid)
      : thread_([this, pid] {
          while (!stop_) {
            samples_.push_back(ResidentMiB(pid));
            absl::SleepFor(absl::Milliseconds(100));
          }
        }) {}
  std::vector<double> Stop() {
    stop_ = true;
    thread_.join();
    return samples_;
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<double> samples_;
  std::thread thread_;
};

Json Milliseconds(const std::vector<double>& seconds) {
  if (seconds.empty()) return nullptr;
  return {{"p50", Percentile(seconds, 0.5) * 1e3}, {"p99", Percentile(seconds, 0.99) * 1e3}};
}

absl::Status CheckCapacity(const InferenceLoad::Counts& counts) {
  if (counts.failed + counts.refused + counts.expired == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("at capacity: ", counts.refused, " refused, ",
                                          counts.failed, " failed: ", counts.first_failure));
}

// Whether a load was overload, and was met as it must be.
absl::Status CheckOverload(const char* load, const InferenceLoad::Counts& counts) {
  if (counts.failed > 0) {
    return absl::InternalError(
        absl::StrCat(load, ": ", counts.failed, " calls failed: ", counts.first_failure));
  }
  if (counts.refused == 0) return absl::InternalError(absl::StrCat(load, ": no call was refused"));
  if (counts.refused_without_delay > 0) {
    return absl::InternalError(absl::StrCat(load, ": ", counts.refused_without_delay, " of ",
                                            counts.refused,
                                            " refused calls were not told when to come again"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Json> Benchmark(bool quick) {
  const absl::Duration closed_time = absl::Seconds(5);
  const absl::Duration open_time = absl::Seconds(quick ? 10 : 60);
  CODISTILL_ASSIGN_OR_RETURN(const JobConfig job, MakeJob());
  CODISTILL_ASSIGN_OR_RETURN(const auto server, Server::Start(job));
  InferenceLoad::Options options;
  options.address = server->address();
  options.model = "mlp";
  options.connections = kConnections;
  RandomStream random(3);
  for (int i = 0; i < kBatches; ++i) {
    Tensor batch = Tensor::Allocate(DT_FLOAT, {kExamples, kInputs});
    for (float& value : batch.As<float>()) value = static_cast<float>(random.Normal());
    options.batches.push_back(std::move(batch));
  }
  CODISTILL_ASSIGN_OR_RETURN(const auto load, InferenceLoad::Start(std::move(options)));
  load->Closed(kOutstanding, absl::Seconds(2));  // warm

  const Processor at_start = ProcessorOf(server->pid());
  const InferenceLoad::Counts before = load->Closed(kOutstanding, closed_time);
  const Processor at_capacity = ProcessorOf(server->pid());
  CODISTILL_RETURN_IF_ERROR(CheckCapacity(before));
  const double first = static_cast<double>(before.answered) / before.seconds;
  std::printf("capacity: %.1f calls/s\n", first);
  std::fflush(stdout);

  MemoryWatch memory(server->pid());
  const Processor open_start = ProcessorOf(server->pid());
  const InferenceLoad::Counts open = load->Open(kFactor * first, open_time);
  const Processor open_end = ProcessorOf(server->pid());
  const std::vector<double> resident = memory.Stop();
  std::printf("offered %.1f calls/s: %.1f answered, %.1f refused, %lld expired, %lld failed\n",
              static_cast<double>(open.offered) / open.seconds,
              static_cast<double>(open.answered) / open.seconds,
              static_cast<double>(open.refused) / open.seconds,
              static_cast<long long>(open.expired), static_cast<long long>(open.failed));
  std::fflush(stdout);
  // What the emptiest call costs a server that computes, at the same rate.
  InferenceLoad::Options empty_options;
  empty_options.address = server->address();
  empty_options.connections = kConnections;
  CODISTILL_ASSIGN_OR_RETURN(const auto empty_load, InferenceLoad::Start(std::move(empty_options)));
  const Processor empty_start = ProcessorOf(server->pid());
  InferenceLoad::Counts empty;
  std::thread calls(
      [&] { empty = empty_load->Open((kFactor - 1) * first, closed_time - absl::Seconds(1)); });
  const InferenceLoad::Counts beside = load->Closed(kOutstanding, closed_time);
  calls.join();
  const Processor empty_end = ProcessorOf(server->pid());
  CODISTILL_RETURN_IF_ERROR(CheckCapacity(beside));
  const Processor flood_start = ProcessorOf(server->pid());
  const InferenceLoad::Counts flood = load->Closed(kFlood, closed_time);
  const Processor flood_end = ProcessorOf(server->pid());
  const InferenceLoad::Counts after = load->Closed(kOutstanding, closed_time);
  CODISTILL_RETURN_IF_ERROR(CheckCapacity(after));
  const double second = static_cast<double>(after.answered) / after.seconds;
  CODISTILL_RETURN_IF_ERROR(CheckOverload("at four times the capacity", open));
  CODISTILL_RETURN_IF_ERROR(CheckOverload("when refused calls come again at once", flood));
  const double capacity = (first + second) / 2;
  if (capacity > kMostCapacity) {
    return absl::FailedPreconditionError(absl::StrCat("this machine answers ", capacity,
                                                      " calls/s: the load is bound by computing "
                                                      "only up to ",
                                                      kMostCapacity,
                                                      "; a larger model would be right"));
  }
  const double answered = static_cast<double>(open.answered);
  const double accepted_cpu = (at_capacity.other - at_start.other) /
                              static_cast<double>(before.answered + before.answered_later);
  // Processor time between two moments that answered calls do not account for, of each of `calls`.
  const auto cpu_us = [&](const Processor& from, const Processor& to, int64_t answers,
                          int64_t calls) {
    return (to.other - from.other - static_cast<double>(answers) * accepted_cpu) /
           static_cast<double>(calls) * 1e6;
  };
  const size_t tenth = std::max<size_t>(1, resident.size() / 10);
  const double early = Median({resident.begin() + tenth, resident.begin() + 2 * tenth});
  const double late = Median({resident.end() - tenth, resident.end()});

  Json out = NewReport("overload", 1,
                       absl::StrCat("server on core ", kServerCore, " with one compute thread, ",
                                    kConnections, " clients on core ", kClientCore));
  out["goodput_ratio"] = answered / open.seconds / capacity;
  out["refusal_cpu_us"] = cpu_us(flood_start, flood_end, flood.answered + flood.answered_later,
                                 flood.refused + flood.refused_later);
  out["refusal_cpu_us_at_4x"] = cpu_us(open_start, open_end, open.answered + open.answered_later,
                                       open.refused + open.refused_later);
  out["empty_call_cpu_us"] = cpu_us(empty_start, empty_end, beside.answered + beside.answered_later,
                                    empty.answered + empty.answered_later);
  out["memory_growth"] = late / early - 1;
  out["refused_without_delay"] = open.refused_without_delay + flood.refused_without_delay;
  out["model"] = "MLP 1024-8192-8192-1000";
  out["shapes"] = absl::StrCat(kExamples, " examples a call, at most ", kMaxBatch, " a pass");
  out["threads"] = 1;
  out["capacity_calls_per_second"] = capacity;
  out["capacity_before_and_after"] = {first, second};
  out["offered_calls_per_second"] = static_cast<double>(open.offered) / open.seconds;
  out["seconds"] = open.seconds;
  out["answered"] = open.answered;
  out["refused"] = open.refused;
  out["expired"] = open.expired;  // in the queue or on the way, 5 s after they were sent
  std::vector<int> by_second(static_cast<size_t>(open.seconds) + 1);
  for (const double at : open.answered_after) ++by_second[static_cast<size_t>(at)];
  by_second.pop_back();  // the last is not whole
  out["answered_by_second"] = by_second;
  out["flood_refusals_per_second"] = static_cast<double>(flood.refused) / flood.seconds;
  out["flood_goodput_ratio"] = static_cast<double>(flood.answered) / flood.seconds / capacity;
  out["accepted_cpu_us_beside_compute"] = accepted_cpu * 1e6;
  out["resident_mib_early_and_late"] = {early, late};
  out["latency_ms"] = Milliseconds(open.latencies);
  out["latency_at_capacity_ms"] = Milliseconds(before.latencies);
  out["refusal_latency_ms"] = Milliseconds(open.refusal_latencies);
  out["verified"] = {
      {"answers_compared", before.answered + open.answered + after.answered},
      {"largest_difference",
       std::max({before.largest_difference, open.largest_difference, after.largest_difference})}};
  return out;
}

int Main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  if (argc > 2 || (argc == 2 && !quick)) {
    std::fprintf(stderr, "usage: overload [--quick]\n");
    return 2;
  }
  if (std::thread::hardware_concurrency() < 2) {
    std::fprintf(stderr, "overload: needs two cores\n");
    return 1;
  }
  absl::Status status = PinToCore(kClientCore);
  if (status.ok()) {
    const absl::StatusOr<Json> result = Benchmark(quick);
    if (result.ok()) {
      PrintReport(*result);
      return 0;
    }
    status = result.status();
  }
  std::fprintf(stderr, "overload: %s\n", status.ToString().c_str());
  return 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::DisableDeadlockDetection();
  codistill::RetainHeap();
  return codistill::Main(argc, argv);
}
