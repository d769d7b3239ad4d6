// What swapping a model in does to those who ask meanwhile: a prediction server on core 0 follows a
// real group on core 1, whose 10 MB model is published anew once a second; clients on core 1 ask
// without a break. Every element of every answer tells which version it comes from. Blocks with and
// without swaps alternate.
//
//   hot_swap [--quick] [--pause_us=N] [--rounds=N]
//
// --pause_us: microseconds that a client waits between answer and question; 0 keeps the server's
// core busy. --rounds: of 10 swaps and 6 s without, 10 unless said otherwise.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <future>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/base/thread_priority.h"
#include "common/config/job.h"
#include "control/child_process.h"
#include "control/daemon_client.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/known_group.h"
#include "tests/benchmarks/known_load.h"

namespace codistill {
namespace {

constexpr int kServerCore = 0, kClientCore = 1;
constexpr absl::Duration kInterval = absl::Seconds(1);  // between swaps

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "hot_swap: %s\n", what.c_str());
  std::exit(1);
}
template <typename T>
T Must(absl::StatusOr<T> value, const char* what) {
  if (!value.ok()) Die(absl::StrCat(what, ": ", value.status().ToString()));
  return *std::move(value);
}

struct Block {
  bool swaps = false;
  absl::Time begin, end;
  std::vector<std::pair<int64_t, absl::Time>> published;
  std::vector<double> latencies;  // seconds
};

// The group and what publishes it live on one thread of lower priority: in a job they would be on
// other machines, and must not take the clients' core from them. The group's process is its child.
class Publisher {
 public:
  explicit Publisher(const KnownGroup::Options& options) {
    std::promise<JobConfig> started;
    thread_ = std::thread([this, options, &started] {
      LowerThreadPriority();
      const std::unique_ptr<KnownGroup> group = Must(KnownGroup::Start(options), "group");
      started.set_value(group->job());
      Work(group.get());
    });
    job_ = started.get_future().get();
  }
  ~Publisher() {
    {
      MutexLock lock(&mu_);
      stopping_ = true;
    }
    thread_.join();
  }

  const JobConfig& job() const { return job_; }

  // From now on one cut after each interval, `count` in all; Wait returns them.
  void Begin(int count) {
    MutexLock lock(&mu_);
    left_ = count;
    published_.clear();
  }
  std::vector<std::pair<int64_t, absl::Time>> Wait() {
    MutexLock lock(&mu_);
    auto done = [this] { return left_ == 0; };
    mu_.Await(absl::Condition(&done));
    return published_;
  }

 private:
  void Work(KnownGroup* group) {
    MutexLock lock(&mu_);
    while (true) {
      auto wanted = [this] { return stopping_ || left_ > 0; };
      mu_.Await(absl::Condition(&wanted));
      absl::Time next = absl::Now() + kInterval / 2;
      while (left_ > 0) {
        if (mu_.AwaitWithDeadline(absl::Condition(&stopping_), next)) return;
        mu_.Unlock();
        const int64_t step = Must(group->Publish(), "publish");
        const absl::Time now = absl::Now();
        mu_.Lock();
        published_.emplace_back(step, now);
        --left_;
        next += kInterval;
      }
      if (stopping_) return;
    }
  }

  JobConfig job_;
  Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  int left_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::pair<int64_t, absl::Time>> published_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

nlohmann::ordered_json Latencies(std::vector<double> seconds) {
  return {{"requests", seconds.size()},
          {"p50_ms", Median(seconds) * 1e3},
          {"p95_ms", Percentile(seconds, 0.95) * 1e3},
          {"p99_ms", Percentile(seconds, 0.99) * 1e3},
          {"p999_ms", Percentile(seconds, 0.999) * 1e3},
          {"max_ms", Percentile(seconds, 1) * 1e3}};
}

// Resident memory of a process, in bytes; 0 if it cannot be told.
int64_t ResidentBytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

int Main(bool quick, int64_t rounds_wanted, absl::Duration pause) {
  if (!PinToCore(kClientCore).ok()) Die("no core 1");
  const int rounds = rounds_wanted > 0 ? static_cast<int>(rounds_wanted) : quick ? 3 : 10;
  const int swaps_a_block = quick ? 3 : 10;
  const absl::Duration quiet_block = absl::Seconds(quick ? 3 : 6);
  const char* const tmp = std::getenv("TEST_TMPDIR");
  KnownGroup::Options options;
  options.directory = JoinPath(tmp == nullptr ? "/tmp" : tmp, "hot_swap");
  options.core = kClientCore;
  if (!FileSystem::Real()->MakeDirs(options.directory).ok()) Die(options.directory);
  Publisher publisher(options);

  const std::string job = JoinPath(options.directory, "served.textproto");
  if (const absl::Status saved = SaveJob(publisher.job(), job); !saved.ok()) {
    Die(saved.ToString());
  }
  const std::string ready = JoinPath(options.directory, "server.ready");
  ChildProcess server = Must(
      StartPinned({"predserver/prediction_server", absl::StrCat("--job=", job), "--group=alpha",
                   "--port=0", absl::StrCat("--ready_file=", ready), "--compute_threads=1"},
                  ready, kServerCore, kClientCore),
      "server");
  KnownLoad::Options load;
  load.address =
      nlohmann::json::parse(Must(ReadFile(ready, 1 << 16), "ready file")).value("address", "");
  load.name = "alpha";
  load.pause = pause;
  for (const absl::Time limit = absl::Now() + absl::Seconds(60);;) {
    const auto status = GetDaemonStatus(load.address, absl::Seconds(5));
    if (status.ok() && status->state() == "serving") break;
    if (absl::Now() > limit) Die("the server never serves");
    absl::SleepFor(absl::Milliseconds(20));
  }

  auto clients = std::make_unique<KnownLoad>(load);
  // Copies of the model, threads and connections that there will be are there before it counts.
  publisher.Begin(3);
  publisher.Wait();
  absl::SleepFor(absl::Seconds(1));
  const int64_t resident_before = ResidentBytes(server.pid());
  std::vector<Block> blocks;
  for (int r = 0; r < rounds; ++r) {
    for (int which = 0; which < 2; ++which) {
      Block block;
      block.swaps = (which + r) % 2 == 0;
      block.begin = absl::Now();
      if (block.swaps) {
        publisher.Begin(swaps_a_block);
        block.published = publisher.Wait();
        // The last one's swap belongs to this block.
        absl::SleepFor(block.published.back().second + kInterval / 2 - absl::Now());
      } else {
        absl::SleepFor(quiet_block);
      }
      block.end = absl::Now();
      blocks.push_back(std::move(block));
    }
  }
  const int64_t resident_after = ResidentBytes(server.pid());
  const KnownLoad::Result result = clients->Stop();
  const auto status = Must(GetDaemonStatus(load.address, absl::Seconds(10)), "status");
  server.Signal(SIGTERM);
  for (const absl::Time limit = absl::Now() + absl::Seconds(30); !server.Poll();) {
    if (absl::Now() > limit) Die("the server does not end");
    absl::SleepFor(absl::Milliseconds(10));
  }

  std::set<int64_t> seen;
  std::vector<double> lags, quiet, swapping, quiet_p99, swapping_p99, quiet_p50, swapping_p50;
  int64_t unseen = 0;
  for (Block& block : blocks) {
    for (const KnownLoad::Answered& one : result.answered) {
      if (one.asked >= block.begin && one.asked < block.end) {
        block.latencies.push_back(absl::ToDoubleSeconds(one.latency));
      }
    }
    if (block.latencies.empty()) Die("a block without an answer");
    auto& all = block.swaps ? swapping : quiet;
    all.insert(all.end(), block.latencies.begin(), block.latencies.end());
    (block.swaps ? swapping_p99 : quiet_p99).push_back(Percentile(block.latencies, 0.99));
    (block.swaps ? swapping_p50 : quiet_p50).push_back(Median(block.latencies));
    for (const auto& [step, at] : block.published) {
      absl::Time first = absl::InfiniteFuture();
      for (const KnownLoad::Answered& one : result.answered) {
        if (one.step == step) first = std::min(first, one.asked + one.latency);
      }
      if (first == absl::InfiniteFuture()) {
        ++unseen;
      } else {
        lags.push_back(absl::ToDoubleSeconds(first - at));
      }
    }
  }
  nlohmann::ordered_json report =
      NewReport("hot_swap", rounds, "server on core 0; clients, group and publisher on core 1");
  const int64_t swaps = int64_t{rounds} * swaps_a_block;
  report["model"] = "MLP 1024-1024-1024-512";
  report["model_bytes"] = KnownModel().elements() * static_cast<int64_t>(sizeof(float));
  report["rows_a_request"] = load.rows;
  report["clients"] = load.clients;
  report["pause_us"] = absl::ToInt64Microseconds(pause);
  report["compute_threads"] = 1;
  report["seconds_between_swaps"] = absl::ToDoubleSeconds(kInterval);
  report["swaps"] = swaps;
  report["swaps_unseen"] = unseen;
  report["failed_requests"] = result.failed;
  report["answers_of_no_single_version"] = result.wrong;
  const double p99_ratio = MedianRatio(swapping_p99, quiet_p99);
  report["p99_ratio"] = p99_ratio;
  report["p99_within_1.5x"] = p99_ratio <= 1.5;
  report["p99_ratio_of_all_blocks"] = Percentile(swapping, 0.99) / Percentile(quiet, 0.99);
  report["p50_ratio"] = MedianRatio(swapping_p50, quiet_p50);
  report["with_swaps"] = Latencies(swapping);
  report["without_swaps"] = Latencies(quiet);
  if (!lags.empty()) {
    report["publish_to_first_answer_ms"] = {{"median", Median(lags) * 1e3},
                                            {"max", Percentile(lags, 1) * 1e3}};
  }
  report["server_swaps"] = status.models(0).swaps();
  report["server_failed_loads"] = status.models(0).failed_loads();
  report["server_resident_mb_before_and_after"] = {static_cast<double>(resident_before) / 1e6,
                                                   static_cast<double>(resident_after) / 1e6};
  if (!result.error.empty()) report["first_error"] = result.error;
  PrintReport(report);
  // A ratio of times is for whoever reads it: it depends on what else the machine does.
  const bool right = result.failed == 0 && result.wrong == 0 && unseen == 0 &&
                     status.models(0).failed_loads() == 0;
  return right ? 0 : 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  bool quick = false;
  int64_t pause = 0, rounds = 0;
  for (int i = 1; i < argc; ++i) {
    absl::string_view argument = argv[i];
    bool known = true;
    if (argument == "--quick") {
      quick = true;
    } else if (absl::ConsumePrefix(&argument, "--pause_us=")) {
      known = absl::SimpleAtoi(argument, &pause);
    } else if (absl::ConsumePrefix(&argument, "--rounds=")) {
      known = absl::SimpleAtoi(argument, &rounds);
    } else {
      known = false;
    }
    if (!known) {
      std::fprintf(stderr, "hot_swap: unknown argument %s\n", argv[i]);
      return 2;
    }
  }
  return codistill::Main(quick, rounds, absl::Microseconds(pause));
}
