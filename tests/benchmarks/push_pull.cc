// What a worker's pushes and pulls move, beside what gRPC itself moves on this machine.
//
// 256 MB of fp32 in tensors like ResNet-50's; servers on core 0, clients on core 1, loopback TCP.
// A pull is timed from the call until the last element is in the caller's tensors; a push from the
// first call until the shard's answer is there: staged, decided by the leader, committed. After
// each timed push an untimed pull is compared with the optimizer's formula in every element.

#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/base/file.h"
#include "common/base/heap.h"
#include "common/base/status.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/raw_grpc.h"
#include "tests/benchmarks/server_group.h"

ABSL_FLAG(bool, quick, false, "Fewer rounds, for a first look.");
ABSL_FLAG(int, rounds, 0, "Rounds; 0 = 12, or 3 with --quick.");
ABSL_FLAG(std::string, only, "",
          "Comma-separated contestants to run (raw is always there), for profiles; empty = all.");

namespace codistill {
namespace {

constexpr int kServerCore = 0;
constexpr int kClientCore = 1;
constexpr int64_t kElements = 64 << 20;  // 256 MiB of fp32
constexpr double kBytes = 4.0 * kElements;
// Below this the machine is not itself, and the run says nothing.
constexpr double kMinRawGbps = 4.0;
constexpr float kSgdRate = 0.125f;
constexpr float kAdamRate = 0.001f;
// Gradients of different rounds are different windows of one array.
constexpr int64_t kWindows = 64;
constexpr int64_t kWindowStep = 16;

absl::Time Soon() { return absl::Now() + absl::Seconds(60); }

void Check(const absl::Status& status, const std::string& what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what.c_str(), status.ToString().c_str());
  std::exit(1);
}

template <typename T>
T CheckValue(absl::StatusOr<T> value, const std::string& what) {
  Check(value.status(), what);
  return *std::move(value);
}

// Processor time of the clients (this process) and of servers, milliseconds a call. Where others
// use the machine too, these say more than the clock on the wall.
class CpuMeter {
 public:
  explicit CpuMeter(std::vector<pid_t> servers) : servers_(std::move(servers)) {}

  double Time(const std::function<void()>& body) {
    const double client = Of(CLOCK_PROCESS_CPUTIME_ID), server = OfServers();
    const double seconds = Seconds(body);
    client_.push_back(1e3 * (Of(CLOCK_PROCESS_CPUTIME_ID) - client));
    server_.push_back(1e3 * (OfServers() - server));
    return seconds;
  }
  void AddTo(const std::string& name, nlohmann::ordered_json* report) const {
    if (client_.empty()) return;
    (*report)["cpu_ms"][name] = {{"client", Median(client_)}, {"server", Median(server_)}};
  }

 private:
  static double Of(clockid_t clock) {
    timespec time = {};
    clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  double OfServers() const {
    double sum = 0;
    for (pid_t pid : servers_) {
      clockid_t clock;
      if (clock_getcpuclockid(pid, &clock) == 0) sum += Of(clock);
    }
    return sum;
  }

  const std::vector<pid_t> servers_;
  std::vector<double> client_, server_;
};

[[noreturn]] void Differs(const std::string& what, int64_t i, float got, double want) {
  std::fprintf(stderr, "%s: element %lld is %.9g, must be %.9g\n", what.c_str(),
               static_cast<long long>(i), got, want);
  std::exit(1);
}

void FillGradient(uint32_t seed, PrefaultedArray* gradient) {
  uint32_t x = seed;
  for (float& value : gradient->span()) {
    x = x * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(x)) * (1.0f / (1 << 30));
  }
}

// One rank as it sees the group: its tensors, its gradient, and what the weights must be.
struct Rank {
  GroupWorker worker;
  std::unique_ptr<PrefaultedArray> weights, gradient;
  std::vector<TensorView> views;

  Rank(GroupWorker joined, uint32_t seed)
      : worker(std::move(joined)),
        weights(std::make_unique<PrefaultedArray>(kElements)),
        gradient(std::make_unique<PrefaultedArray>(kElements + kWindows * kWindowStep)),
        views(ViewsOf(worker.registered.shard_map(), weights->span())) {
    FillGradient(seed, gradient.get());
  }

  const float* GradientOf(int64_t step) const {
    return gradient->data() + (step % kWindows) * kWindowStep;
  }

  void Pull(int64_t step) {
    Check(
        worker.tensors
            ->Pull(TensorClient::Source::kStep, worker.registered.generation(), step, views, Soon())
            .status(),
        "pull");
  }

  void Push(int64_t step) {
    TensorClient::PushHeader header;
    header.generation = worker.registered.generation();
    header.step = step;
    header.rank = worker.rank;
    header.incarnation = worker.registered.incarnation();
    header.weights_step = step - 1;
    const std::unique_ptr<PushStream> push = worker.tensors->StartPush(header, Soon());
    const float* at = GradientOf(step);
    for (size_t i = 0; i < views.size(); ++i) {
      push->AddGradient(static_cast<int>(i), at, nullptr);
      at += views[i].elements();
    }
    PushEnd end;
    end.set_num_examples(4);
    const auto result = CheckValue(push->Finish(std::move(end)), "push");
    if (result.outcome != APPLIED) {
      Check(absl::InternalError(PushOutcome_Name(result.outcome)), "push");
    }
  }
};

// A group and its ranks, which all pull and push at the same time.
class Group {
 public:
  Group(const std::string& name, OptimizerConfig::Kind kind, int shards, int workers,
        const std::string& directory, std::vector<std::string> flags) {
    ServerGroup::Options options;
    options.name = name;
    options.directory = directory;
    OptimizerConfig* const optimizer = options.training.mutable_optimizer();
    optimizer->set_kind(kind);
    optimizer->set_learning_rate(kind == OptimizerConfig::ADAM ? kAdamRate : kSgdRate);
    options.training.set_publish_every_steps(1000000);
    options.num_shards = shards;
    options.num_workers = workers;
    options.server_core = kServerCore;
    options.client_core = kClientCore;
    options.flags = std::move(flags);
    servers_ = CheckValue(ServerGroup::Start(options), name);
    std::vector<pid_t> pids;
    for (int s = 0; s < shards; ++s) pids.push_back(servers_->pid(s));
    pull_cpu_ = std::make_unique<CpuMeter>(pids);
    push_cpu_ = std::make_unique<CpuMeter>(pids);
    for (int r = 0; r < workers; ++r) {
      ranks_.push_back(std::make_unique<Rank>(CheckValue(servers_->Join(r), name), 17 + r));
    }
    expected_ = std::make_unique<PrefaultedArray>(kElements);
    for (int64_t i = 0; i < kElements; ++i) {
      expected_->data()[i] = ServerGroup::InitialWeight(i);
    }
    if (kind == OptimizerConfig::ADAM) {
      m_ = std::make_unique<PrefaultedArray>(kElements);
      v_ = std::make_unique<PrefaultedArray>(kElements);
      std::memset(m_->data(), 0, m_->bytes());
      std::memset(v_->data(), 0, v_->bytes());
    }
    AllRanks([&](Rank* rank) { rank->Pull(0); });
    Compare();
    for (int i = 0; i < 2; ++i) Push();  // warm-up
    Pull();
  }

  double Pull() {
    for (auto& rank : ranks_) std::memset(rank->weights->data(), 0xff, rank->weights->bytes());
    const double seconds =
        pull_cpu_->Time([&] { AllRanks([&](Rank* rank) { rank->Pull(step_); }); });
    Compare();
    return kBytes * ranks_.size() / seconds / 1e9;
  }

  double Push() {
    ++step_;
    const double seconds =
        push_cpu_->Time([&] { AllRanks([&](Rank* rank) { rank->Push(step_); }); });
    AllRanks([&](Rank* rank) { rank->Pull(step_); });
    Advance();
    return kBytes * ranks_.size() / seconds / 1e9;
  }

  // That the tensors went where they were meant to.
  void CheckPath(bool shared_memory) const {
    for (const auto& rank : ranks_) {
      const TensorClient::StreamCounts counts = rank->worker.tensors->stream_counts();
      if ((shared_memory ? counts.grpc : counts.shared_memory) > 0) {
        Check(absl::InternalError(absl::StrCat(counts.grpc, " streams through gRPC, ",
                                               counts.shared_memory, " through shared memory")),
              "path");
      }
    }
  }

  void AddCpuTo(const std::string& suffix, nlohmann::ordered_json* report) const {
    pull_cpu_->AddTo("pull" + suffix, report);
    push_cpu_->AddTo("push" + suffix, report);
  }

 private:
  template <typename Body>
  void AllRanks(const Body& body) {
    std::vector<std::thread> threads;
    for (size_t r = 1; r < ranks_.size(); ++r) {
      threads.emplace_back([&, r] { body(ranks_[r].get()); });
    }
    body(ranks_[0].get());
    for (std::thread& thread : threads) thread.join();
  }

  // Whether all ranks hold `expected_` to the bit.
  void Compare() const {
    for (const auto& rank : ranks_) {
      if (std::memcmp(rank->weights->data(), expected_->data(), expected_->bytes()) == 0) continue;
      for (int64_t i = 0; i < kElements; ++i) {
        const float got = rank->weights->data()[i];
        if (!(got == expected_->data()[i])) Differs("pull", i, got, expected_->data()[i]);
      }
    }
  }

  // Checks what was pulled after a push against the formula, from what was pulled before; what was
  // pulled is expected from now on.
  void Advance() {
    std::vector<const float*> gradients;
    for (const auto& rank : ranks_) gradients.push_back(rank->GradientOf(step_));
    const float* const got = ranks_[0]->weights->data();
    float* const before = expected_->data();
    const double share = 1.0 / static_cast<double>(ranks_.size());
    const double correction1 = 1 - std::pow(0.9, static_cast<double>(step_));
    const double correction2 = 1 - std::pow(0.999, static_cast<double>(step_));
    for (int64_t i = 0; i < kElements; ++i) {
      double g = 0;
      for (const float* gradient : gradients) g += share * gradient[i];
      double want, tolerance;
      if (m_ == nullptr) {
        want = before[i] - kSgdRate * g;
        tolerance = 4 * 0x1p-24 * (std::fabs(before[i]) + kSgdRate);
      } else {
        const double m = 0.9f * m_->data()[i] + (1.0f - 0.9f) * g;
        const double v = 0.999f * v_->data()[i] + (1.0f - 0.999f) * g * g;
        m_->data()[i] = static_cast<float>(m);
        v_->data()[i] = static_cast<float>(v);
        want = before[i] - kAdamRate * (m / correction1) / (std::sqrt(v / correction2) + 1e-8);
        tolerance = 4 * 0x1p-24 * std::fabs(before[i]) + 1e-4 * kAdamRate;
      }
      if (!(std::fabs(got[i] - want) <= tolerance)) Differs("push", i, got[i], want);
    }
    std::memcpy(before, got, expected_->bytes());
    Compare();  // the other ranks have the same
  }

  std::unique_ptr<ServerGroup> servers_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::unique_ptr<PrefaultedArray> expected_, m_, v_;
  std::unique_ptr<CpuMeter> pull_cpu_, push_cpu_;
  int64_t step_ = 0;
};

int RunBenchmark() {
  const bool quick = absl::GetFlag(FLAGS_quick);
  int rounds = absl::GetFlag(FLAGS_rounds);
  if (rounds == 0) rounds = quick ? 3 : 12;
  const std::string only = absl::GetFlag(FLAGS_only);
  const auto wanted = [&](const std::string& name) {
    return only.empty() || absl::StrCat(",", only, ",").find("," + name + ",") != std::string::npos;
  };
  Check(PinToCore(kClientCore), "pinning");

  const char* const tmp = std::getenv("TEST_TMPDIR");
  const std::string directory = JoinPath(tmp == nullptr ? "/tmp" : tmp, "push_pull");
  const std::vector<int64_t> sizes = ResNet50LikeSizes(kElements);
  Check(FileSystem::Real()->MakeDirs(directory), directory);
  if (only != "none") Check(ServerGroup::WriteModel(sizes, directory), "model");

  const std::string raw_ready = JoinPath(directory, "raw.ready");
  ChildProcess raw_server = CheckValue(
      StartPinned({"tests/benchmarks/raw_grpc_server", absl::StrCat(kElements), raw_ready},
                  raw_ready, kServerCore, kClientCore),
      "raw");
  const auto raw =
      RawGrpcClient::Create(CheckValue(ReadFile(raw_ready, 1 << 16), "raw server's address"));
  PrefaultedArray raw_from(kElements), raw_to(kElements);
  for (int64_t i = 0; i < kElements; ++i) raw_from.data()[i] = static_cast<float>(i % 1024);

  CpuMeter raw_push_cpu({raw_server.pid()}), raw_pull_cpu({raw_server.pid()});
  std::vector<Contestant> contestants;
  contestants.push_back({"raw_push", [&] {
                           return kBytes / 1e9 / raw_push_cpu.Time([&] {
                             Check(raw->Push(raw_from.span()), "raw push");
                           });
                         }});
  contestants.push_back({"raw_pull", [&] {
                           std::memset(raw_to.data(), 0xff, raw_to.bytes());
                           const double seconds = raw_pull_cpu.Time(
                               [&] { Check(raw->Pull(raw_to.span()), "raw pull"); });
                           if (std::memcmp(raw_to.data(), raw_from.data(), raw_to.bytes()) != 0) {
                             Check(absl::DataLossError("differs from what was sent"), "raw pull");
                           }
                           return kBytes / 1e9 / seconds;
                         }});
  raw->Push(raw_from.span()).IgnoreError();
  raw->Pull(raw_to.span()).IgnoreError();

  // Shared memory is measured beside a memcpy of the same bytes; everything else without it.
  const std::vector<std::string> through_grpc = {"--noshared_memory"};
  std::unique_ptr<Group> sgd, adam, wide, shm;
  if (wanted("pull") || wanted("push")) {
    sgd = std::make_unique<Group>("sgd", OptimizerConfig::SGD, 1, 1, directory, through_grpc);
    if (wanted("pull")) contestants.push_back({"pull", [&] { return sgd->Pull(); }});
    if (wanted("push")) contestants.push_back({"push", [&] { return sgd->Push(); }});
  }
  if (wanted("push_adam")) {
    adam = std::make_unique<Group>("adam", OptimizerConfig::ADAM, 1, 1, directory, through_grpc);
    contestants.push_back({"push_adam", [&] { return adam->Push(); }});
  }
  if (wanted("2x2")) {
    wide = std::make_unique<Group>("wide", OptimizerConfig::SGD, 2, 2, directory, through_grpc);
    contestants.push_back({"pull_2x2", [&] { return wide->Pull(); }});
    contestants.push_back({"push_2x2", [&] { return wide->Push(); }});
  }

  if (wanted("shm")) {
    shm = std::make_unique<Group>("shm", OptimizerConfig::SGD, 1, 1, directory,
                                  std::vector<std::string>());
    contestants.push_back({"memcpy", [&] {
                             return kBytes / 1e9 / Seconds([&] {
                                      std::memcpy(raw_to.data(), raw_from.data(), raw_to.bytes());
                                    });
                           }});
    contestants.push_back({"shm_pull", [&] { return shm->Pull(); }});
    contestants.push_back({"shm_push", [&] { return shm->Push(); }});
  }

  std::map<std::string, std::vector<double>> gbps = Alternate(rounds, contestants);

  nlohmann::ordered_json report =
      NewReport("push_pull", rounds, "servers on core 0, clients on core 1");
  report["bytes"] = static_cast<int64_t>(kBytes);
  report["tensors"] = sizes.size();
  // The faster of the two directions, so that the product is never compared with a slow one.
  const std::vector<double>& raw_gbps =
      Median(gbps["raw_push"]) >= Median(gbps["raw_pull"]) ? gbps["raw_push"] : gbps["raw_pull"];
  report["raw_grpc_gbps"] = Median(raw_gbps);
  for (const auto& entry : gbps) report[entry.first + "_gbps"] = Median(entry.second);
  const auto ratio = [&](const std::string& figure, const std::string& name) {
    if (gbps.count(name) > 0) report[figure] = MedianRatio(gbps[name], raw_gbps);
  };
  ratio("pull_vs_raw_grpc", "pull");
  ratio("push_vs_raw_grpc", "push");
  ratio("push_adam_vs_raw_grpc", "push_adam");
  ratio("shm_pull_vs_raw_grpc", "shm_pull");
  if (shm != nullptr) {
    report["shm_pull_vs_memcpy"] = MedianRatio(gbps["shm_pull"], gbps["memcpy"]);
    report["shm_push_vs_memcpy"] = MedianRatio(gbps["shm_push"], gbps["memcpy"]);
  }
  if (gbps.count("pull_2x2") > 0 && gbps.count("pull") > 0 && gbps.count("push") > 0) {
    const double pull = MedianRatio(gbps["pull_2x2"], gbps["pull"]);
    const double push = MedianRatio(gbps["push_2x2"], gbps["push"]);
    report["aggregate_2x2_vs_1x1_pull"] = pull;
    report["aggregate_2x2_vs_1x1_push"] = push;
    report["aggregate_2x2_vs_1x1"] = std::min(pull, push);
  }
  raw_push_cpu.AddTo("raw_push", &report);
  raw_pull_cpu.AddTo("raw_pull", &report);
  if (sgd != nullptr) sgd->AddCpuTo("", &report);
  if (adam != nullptr) adam->AddCpuTo("_adam", &report);
  if (wide != nullptr) wide->AddCpuTo("_2x2", &report);
  if (shm != nullptr) shm->AddCpuTo("_shm", &report);
  for (const auto* group : {sgd.get(), adam.get(), wide.get()}) {
    if (group != nullptr) group->CheckPath(/*shared_memory=*/false);
  }
  if (shm != nullptr) shm->CheckPath(/*shared_memory=*/true);
  raw_server.Signal(9);
  const bool void_run = Median(raw_gbps) < kMinRawGbps;
  if (void_run) {
    std::fprintf(stderr,
                 "void: gRPC itself moved %.2f GB/s, less than %.1f: not a machine, or not "
                 "a moment, to measure on\n",
                 Median(raw_gbps), kMinRawGbps);
  }
  report["void"] = void_run;
  PrintReport(report);
  return void_run ? 1 : 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::DisableDeadlockDetection();
  codistill::ConfigureHeapForTensors();
  absl::ParseCommandLine(argc, argv);
  return codistill::RunBenchmark();
}
