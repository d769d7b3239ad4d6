// Rows of an embedding table, pulled and pushed: 10 million rows of 16 fp32 with Adagrad.
//
// Random 64-bit keys are pushed, shuffled, into an empty table that was told no size; then 64
// distinct batches of 65,536 unique keys, drawn by Zipf's law from all, are pulled and pushed in
// turn. Rows are made on a miss by pulls and pushes alike, and the table's locks are on. Server on
// core 0, client on core 1, loopback TCP, at most 8 calls under way. A pull is timed from the list
// of keys until the last row is in the caller's array, a push from the rows in the caller's array
// until the server has answered that they are applied. Every row pulled is compared with what it
// must be by the number of its pushes. The table alone, in this process, is measured beside it.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/client/row_client.h"
#include "common/embedding/default_row.h"
#include "common/rpc/bulk_channel.h"
#include "server/embedding/embedding_table.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/server_group.h"

ABSL_FLAG(bool, quick, false, "Fewer rounds, for a first look.");
ABSL_FLAG(int, rounds, 0, "Rounds; 0 = 10, or 3 with --quick.");
ABSL_FLAG(int64_t, rows, 10000000, "Rows of the table.");
ABSL_FLAG(bool, remote, true, "Measure over gRPC, not the table alone.");

namespace codistill {
namespace {

constexpr int kServerCore = 0;
constexpr int kClientCore = 1;
constexpr int kDim = 16;
constexpr size_t kBatch = 65536;
constexpr size_t kBatches = 64;
constexpr int kCalls = 8;
// Pushes are answered one by one, each to its own rank.
constexpr int kRanks = 2;
constexpr double kRate = 0.05;
constexpr double kZipf = 1.05;
// Key, row and slot: what a table without any overhead would take.
constexpr double kRowBytes = 8 + 4 * kDim + 4 * kDim;

absl::Time Soon() { return absl::Now() + absl::Seconds(60); }

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}
void Check(const absl::Status& status, const std::string& what) {
  if (!status.ok()) Die(absl::StrCat(what, ": ", status.ToString()));
}
template <typename T>
T CheckValue(absl::StatusOr<T> value, const std::string& what) {
  Check(value.status(), what);
  return *std::move(value);
}

// A field of /proc/PID/status in bytes.
double ProcessBytes(pid_t pid, const std::string& field) {
  std::ifstream status(absl::StrCat("/proc/", pid, "/status"));
  for (std::string line; std::getline(status, line);) {
    if (!absl::StartsWith(line, field + ":")) continue;
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
    int64_t kib = 0;
    if (words.size() >= 2 && absl::SimpleAtoi(words[1], &kib)) return 1024.0 * kib;
  }
  Die(absl::StrCat("no ", field, " of process ", pid));
}

// The i-th key: any 64 bits, each once.
uint64_t KeyOf(uint64_t i) { return MixBits(i + 0x517cc1b727220a95u); }

// The gradient of a key is the same at every push: +-1/2 by bits of its hash. So Adagrad's sum
// after k pushes is k / 4, and the row follows from k.
void GradientOf(uint64_t key, float* gradient) {
  const uint64_t bits = Mix(key, 77);
  for (int d = 0; d < kDim; ++d) gradient[d] = ((bits >> d) & 1) != 0 ? 0.5f : -0.5f;
}

struct Batch {
  std::vector<uint32_t> ids;
  std::vector<uint64_t> keys;
};

class Work {
 public:
  explicit Work(int64_t rows) : rows_(rows), pushes_(rows, 0) {
    // Zipf by rejection-inversion (Hoermann and Derflinger 1996) over ranks 1 .. rows; a
    // permutation says which key has which rank.
    const Permutation by_rank(5, rows);
    RandomStream random(99);
    std::vector<uint8_t> used(rows, 0);
    batches_.resize(kBatches);
    for (Batch& batch : batches_) {
      while (batch.ids.size() < std::min<size_t>(kBatch, rows / 2)) {
        const uint32_t id = static_cast<uint32_t>(by_rank(Zipf(&random) - 1));
        if (used[id] != 0) continue;
        used[id] = 1;
        batch.ids.push_back(id);
        batch.keys.push_back(KeyOf(id));
      }
      for (const uint32_t id : batch.ids) used[id] = 0;
    }
    init_.seed = 4711;
    init_.scale = 0.05f;
    double sum = 0;
    for (int k = 0; k < 65536; ++k) {
      moved_.push_back(kRate * sum);
      sum += 1 / std::sqrt(static_cast<double>(k + 1));
    }
  }

  int64_t rows() const { return rows_; }
  const std::vector<Batch>& batches() const { return batches_; }
  RowInit* init() { return &init_; }

  // Batches in which all keys come once, shuffled.
  template <typename Push>
  void ForAllKeys(const Push& push) const {
    const Permutation order(3, rows_);
    Batch batch;
    for (int64_t i = 0; i < rows_; ++i) {
      batch.ids.push_back(static_cast<uint32_t>(order(i)));
      batch.keys.push_back(KeyOf(batch.ids.back()));
      if (batch.ids.size() < kBatch && i + 1 < rows_) continue;
      push(batch);
      batch.ids.clear();
      batch.keys.clear();
    }
  }

  static std::vector<float> Gradients(const Batch& batch) {
    std::vector<float> gradients(batch.keys.size() * kDim);
    for (size_t i = 0; i < batch.keys.size(); ++i) GradientOf(batch.keys[i], &gradients[i * kDim]);
    return gradients;
  }

  void Pushed(const Batch& batch) {
    for (const uint32_t id : batch.ids) ++pushes_[id];
  }
  void Reset() { std::fill(pushes_.begin(), pushes_.end(), 0); }

  // All elements of all rows, or the end of the program.
  void Verify(const Batch& batch, const float* rows, const std::string& what) const {
    float row[kDim], gradient[kDim];
    for (size_t i = 0; i < batch.keys.size(); ++i) {
      const int count = pushes_[batch.ids[i]];
      DefaultRow(init_, batch.keys[i], absl::MakeSpan(row));
      GradientOf(batch.keys[i], gradient);
      for (int d = 0; d < kDim; ++d) {
        const double want = row[d] - (gradient[d] > 0 ? moved_[count] : -moved_[count]);
        const double got = rows[i * kDim + d];
        if (!(std::abs(got - want) <= 2e-7 * (count + 1))) {
          Die(absl::StrCat(what, ": key ", batch.keys[i], " after ", count, " pushes: element ", d,
                           " is ", got, ", not ", want));
        }
      }
    }
  }

 private:
  uint64_t Zipf(RandomStream* random) const {
    const double n = static_cast<double>(rows_);
    const auto integral = [](double x) { return (std::pow(x, 1 - kZipf) - 1) / (1 - kZipf); };
    const double low = integral(1.5) - 1, high = integral(n + 0.5);
    while (true) {
      const double u = high + random->Uniform() * (low - high);
      const double x = std::pow(1 + u * (1 - kZipf), 1 / (1 - kZipf));
      const double k = std::min(std::max(std::floor(x + 0.5), 1.0), n);
      if (u >= integral(k + 0.5) - std::pow(k, -kZipf)) return static_cast<uint64_t>(k);
    }
  }

  const int64_t rows_;
  std::vector<uint16_t> pushes_;  // by id
  std::vector<Batch> batches_;
  RowInit init_;
  std::vector<double> moved_;  // by number of pushes
};

struct Figures {
  std::vector<double> pull, push;  // rows a second, by round
  double insert_rows_per_s = 0;
  double grow_ms = 0;   // worst batch while the table grew
  double evict_ms = 0;  // and while it evicted
  double bytes = 0;     // of memory
};

EmbeddingTable::Options TableOptions(Work* work) {
  EmbeddingTable::Options options;
  options.name = "bench";
  options.dim = kDim;
  options.init = *work->init();
  options.optimizer.kind = RowOptimizer::Kind::kAdagrad;
  options.optimizer.epsilon = 1e-10f;
  options.insert_on_gather = true;
  return options;
}

// The table alone, on this thread.
Figures MeasureTable(Work* work, int rounds) {
  Figures figures;
  auto table = CheckValue(EmbeddingTable::Create(TableOptions(work)), "table");
  int64_t step = 0;
  double inserting = 0;
  work->ForAllKeys([&](const Batch& batch) {
    const std::vector<float> gradients = Work::Gradients(batch);
    const double s = Seconds([&] { table->Apply({++step, kRate}, batch.keys, gradients); });
    inserting += s;
    figures.grow_ms = std::max(figures.grow_ms, 1e3 * s);
    work->Pushed(batch);
  });
  figures.insert_rows_per_s = work->rows() / inserting;
  figures.bytes = static_cast<double>(table->stats().bytes);
  if (table->stats().rows != work->rows()) Die("rows are missing");
  std::vector<std::vector<float>> gradients;
  for (const Batch& batch : work->batches()) gradients.push_back(Work::Gradients(batch));
  std::vector<float> rows(kBatch * kDim);
  const size_t keys = work->batches()[0].keys.size();
  for (int round = 0; round < rounds; ++round) {
    double pulling = 0, pushing = 0;
    for (size_t b = 0; b < kBatches; ++b) {
      const Batch& batch = work->batches()[b];
      pulling += Seconds([&] {
        Check(table->Gather(batch.keys, absl::MakeSpan(rows).first(keys * kDim)), "gather");
      });
      work->Verify(batch, rows.data(), "in process");
      pushing += Seconds([&] { table->Apply({++step, kRate}, batch.keys, gradients[b]); });
      work->Pushed(batch);
    }
    figures.pull.push_back(kBatches * keys / pulling);
    figures.push.push_back(kBatches * keys / pushing);
  }
  work->Reset();
  return figures;
}

// A table that is always full: every batch brings new keys, for which old ones go.
double MeasureEviction(Work* work) {
  EmbeddingTable::Options options = TableOptions(work);
  options.max_bytes = static_cast<uint64_t>(work->rows() / 2 * kRowBytes);
  options.max_age_steps = 200;
  auto table = CheckValue(EmbeddingTable::Create(options), "table");
  int64_t step = 0, evicted = 0;
  double worst = 0;
  work->ForAllKeys([&](const Batch& batch) {
    const std::vector<float> gradients = Work::Gradients(batch);
    worst = std::max(worst, Seconds([&] {
                       evicted += table->Apply({++step, kRate}, batch.keys, gradients).evicted;
                     }));
  });
  if (table->stats().total.evicted == 0) Die("nothing was evicted");
  return 1e3 * worst;
}

class RemoteTable {
 public:
  RemoteTable(Work* work, const std::string& directory) : work_(work) {
    ServerGroup::Options options;
    options.name = "embedding";
    options.directory = directory;
    options.training.set_update_mode(TrainingConfig::ASYNC);
    options.training.set_publish_every_steps(1000000000);
    options.num_workers = kRanks;
    options.server_core = kServerCore;
    options.client_core = kClientCore;
    EmbeddingTableConfig table;
    table.set_name("bench");
    table.set_dim(kDim);
    table.set_init_scale(work->init()->scale);
    table.set_insert_on_pull(true);
    table.mutable_optimizer()->set_kind(RowOptimizerConfig::ADAGRAD);
    table.mutable_optimizer()->set_learning_rate(kRate);
    table.mutable_optimizer()->set_initial_accumulator(0);
    table.mutable_optimizer()->set_epsilon(1e-10f);
    options.tables.push_back(table);
    Check(ServerGroup::WriteModel({64}, directory), "model");
    servers_ = CheckValue(ServerGroup::Start(options), "servers");
    for (int rank = 0; rank < kRanks; ++rank) {
      workers_.push_back(CheckValue(servers_->Join(rank), "joining"));
    }
    work->init()->seed = servers_->table_seed(0);
    RowClient::Options rows;
    rows.group = servers_->ref();
    rows.shard_map_digest = workers_[0].registered.shard_map_digest();
    rows.shard_addresses = {servers_->address(0)};
    rows.max_calls = kCalls;
    rows_ = CheckValue(RowClient::Create(rows), "row client");
    arrays_ = std::make_unique<PrefaultedArray>(kBatches * kBatch * kDim);
  }

  Figures Measure(int rounds) {
    Figures figures;
    double inserting = 0;
    work_->ForAllKeys([&](const Batch& batch) {
      const std::vector<float> gradients = Work::Gradients(batch);
      const double s = Seconds([&] { Push(0, batch, gradients); });
      inserting += s;
      figures.grow_ms = std::max(figures.grow_ms, 1e3 * s);
      work_->Pushed(batch);
    });
    figures.insert_rows_per_s = work_->rows() / inserting;
    for (const Batch& batch : work_->batches()) gradients_.push_back(Work::Gradients(batch));
    const size_t keys = work_->batches()[0].keys.size();
    for (int round = 0; round < rounds; ++round) {
      figures.pull.push_back(kBatches * keys / Seconds([&] { PullAll(); }));
      for (size_t b = 0; b < kBatches; ++b) {
        work_->Verify(work_->batches()[b], arrays_->data() + b * kBatch * kDim, "over gRPC");
      }
      figures.push.push_back(kBatches * keys / Seconds([&] { PushAll(); }));
      for (const Batch& batch : work_->batches()) work_->Pushed(batch);
    }
    PullAll();
    for (size_t b = 0; b < kBatches; ++b) {
      work_->Verify(work_->batches()[b], arrays_->data() + b * kBatch * kDim, "over gRPC");
    }
    figures.bytes = ProcessBytes(servers_->pid(0), "VmHWM");
    return figures;
  }

 private:
  void PullAll() {
    std::vector<std::unique_ptr<RowClient::Pending>> pending;
    for (size_t b = 0; b < kBatches; ++b) {
      RowClient::Request request;
      request.source = TensorClient::Source::kAtLeastStep;
      request.generation = workers_[0].registered.generation();
      request.dim = kDim;
      request.keys = work_->batches()[b].keys;
      request.rows = arrays_->data() + b * kBatch * kDim;
      pending.push_back(rows_->Start(request, Soon()));
    }
    for (const auto& one : pending) Check(one->Wait().status(), "pull");
  }

  // Half of the batches each, one after the other.
  void PushAll() {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([this, rank] {
        for (size_t b = rank; b < kBatches; b += kRanks) {
          Push(rank, work_->batches()[b], gradients_[b]);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  void Push(int rank, const Batch& batch, const std::vector<float>& gradients) {
    GroupWorker& worker = workers_[rank];
    TensorClient::PushHeader header;
    header.generation = worker.registered.generation();
    header.step = ++steps_[rank];
    header.rank = rank;
    header.incarnation = worker.registered.incarnation();
    const std::unique_ptr<PushStream> push = worker.tensors->StartPush(header, Soon());
    push->AddGradient(0, dense_->data(), dense_);
    push->AddRows(0, "bench", kDim, batch.keys, gradients.data());
    PushEnd end;
    end.set_num_examples(1);
    end.set_num_labels(1);
    const PushStream::Result result = CheckValue(push->Finish(end), "push");
    if (result.outcome != APPLIED) Die(absl::StrCat("push: ", result.message));
  }

  Work* const work_;
  std::unique_ptr<ServerGroup> servers_;
  std::vector<GroupWorker> workers_;
  std::unique_ptr<RowClient> rows_;
  int64_t steps_[kRanks] = {};
  const std::shared_ptr<std::vector<float>> dense_ = std::make_shared<std::vector<float>>(64, 0.0f);
  std::unique_ptr<PrefaultedArray> arrays_;
  std::vector<std::vector<float>> gradients_;
};

int Main() {
  const bool quick = absl::GetFlag(FLAGS_quick);
  const int rounds =
      absl::GetFlag(FLAGS_rounds) > 0 ? absl::GetFlag(FLAGS_rounds) : (quick ? 3 : 10);
  AllowSharedMemory(false);
  Check(PinToCore(kClientCore), "pinning");
  Work work(absl::GetFlag(FLAGS_rows));
  auto report = NewReport("embedding", rounds, "server core 0, client core 1");
  report["rows"] = work.rows();
  report["dim"] = kDim;
  report["optimizer"] = "ADAGRAD";
  report["batches"] = kBatches;
  report["batch_keys"] = work.batches()[0].keys.size();
  report["zipf_exponent"] = kZipf;
  report["calls_in_flight"] = kCalls;
  double max_pause = 0;
  {
    const Figures alone = MeasureTable(&work, rounds);
    report["in_process_pull_rows_per_s"] = Median(alone.pull);
    report["in_process_push_rows_per_s"] = Median(alone.push);
    report["in_process_insert_rows_per_s"] = alone.insert_rows_per_s;
    report["in_process_memory_ratio"] = alone.bytes / (work.rows() * kRowBytes);
    report["in_process_grow_pause_ms"] = alone.grow_ms;
    const double evict_ms = MeasureEviction(&work);
    report["in_process_evict_pause_ms"] = evict_ms;
    max_pause = std::max(alone.grow_ms, evict_ms);
  }
  if (absl::GetFlag(FLAGS_remote)) {
    const char* const scratch = std::getenv("TEST_TMPDIR");
    const std::string directory =
        JoinPath(scratch != nullptr ? scratch : "/tmp", absl::StrCat("embedding-", getpid()));
    RemoteTable remote(&work, directory);
    const Figures figures = remote.Measure(rounds);
    report["pull_rows_per_s"] = Median(figures.pull);
    report["push_rows_per_s"] = Median(figures.push);
    report["insert_rows_per_s"] = figures.insert_rows_per_s;
    report["memory_ratio"] = figures.bytes / (work.rows() * kRowBytes);
    report["grow_pause_ms"] = figures.grow_ms;
    max_pause = std::max(max_pause, figures.grow_ms);
  }
  report["max_pause_ms"] = max_pause;
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::DisableDeadlockDetection();
  codistill::RetainHeap();
  absl::ParseCommandLine(argc, argv);
  return codistill::Main();
}
