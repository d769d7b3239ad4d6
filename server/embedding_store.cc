#include "server/embedding_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/config/embedding.h"

namespace codistill {
namespace {

RowOptimizer::Kind KindOf(RowOptimizerConfig::Kind kind) {
  switch (kind) {
    case RowOptimizerConfig::ADAGRAD:
      return RowOptimizer::Kind::kAdagrad;
    case RowOptimizerConfig::SGD:
      return RowOptimizer::Kind::kSgd;
    case RowOptimizerConfig::FTRL:
      return RowOptimizer::Kind::kFtrl;
    case RowOptimizerConfig::MOMENTUM:
      return RowOptimizer::Kind::kMomentum;
    case RowOptimizerConfig::ADAM:
      return RowOptimizer::Kind::kAdam;
  }
  return RowOptimizer::Kind::kSgd;
}

EmbeddingTable::Options OptionsOf(const JobConfig& job, int group, int index, int num_shards) {
  const EmbeddingTableConfig& config = job.model().embedding_tables(index);
  EmbeddingTable::Options options;
  options.name = config.name();
  options.dim = static_cast<int>(config.dim());
  options.init.seed = EmbeddingSeed(job, group, index);
  options.init.scale = config.init_scale();
  const RowOptimizerConfig& optimizer = config.optimizer();
  options.optimizer.kind = KindOf(optimizer.kind());
  options.optimizer.weight_decay = optimizer.weight_decay();
  options.optimizer.momentum = optimizer.momentum();
  options.optimizer.beta1 = optimizer.beta1();
  options.optimizer.beta2 = optimizer.beta2();
  options.optimizer.epsilon = optimizer.epsilon();
  options.optimizer.initial_accumulator = optimizer.initial_accumulator();
  options.optimizer.ftrl_beta = optimizer.beta();
  options.optimizer.l1 = optimizer.l1();
  options.optimizer.l2 = optimizer.l2();
  options.min_count = config.admission_min_count();
  options.max_age_steps = config.evict_age_steps();
  options.min_norm = config.evict_min_norm();
  options.insert_on_gather = config.insert_on_pull();
  options.max_bytes = static_cast<uint64_t>(config.max_bytes()) / num_shards;
  return options;
}

std::vector<EmbeddingTable*> Pointers(const std::vector<std::unique_ptr<EmbeddingTable>>& tables) {
  std::vector<EmbeddingTable*> pointers;
  for (const auto& table : tables) pointers.push_back(table.get());
  return pointers;
}

std::vector<std::string> OptimizersOf(const JobConfig& job) {
  std::vector<std::string> kinds;
  for (const EmbeddingTableConfig& table : job.model().embedding_tables()) {
    kinds.push_back(RowOptimizerConfig::Kind_Name(table.optimizer().kind()));
  }
  return kinds;
}

std::vector<RowLayout::Table> LayoutOf(const std::vector<std::unique_ptr<EmbeddingTable>>& tables) {
  std::vector<RowLayout::Table> layout;
  for (const auto& table : tables) layout.push_back({table->options().name, table->dim()});
  return layout;
}

}  // namespace

absl::StatusOr<std::unique_ptr<EmbeddingStore>> EmbeddingStore::Create(const JobConfig& job,
                                                                       int group, int shard,
                                                                       int num_shards) {
  std::vector<std::unique_ptr<EmbeddingTable>> tables;
  for (int i = 0; i < job.model().embedding_tables_size(); ++i) {
    absl::StatusOr<std::unique_ptr<EmbeddingTable>> table =
        EmbeddingTable::Create(OptionsOf(job, group, i, num_shards));
    if (!table.ok()) {
      return Annotate(table.status(), absl::StrCat("model.embedding_tables[", i, "]"));
    }
    tables.push_back(*std::move(table));
  }
  return std::unique_ptr<EmbeddingStore>(
      new EmbeddingStore(job, std::move(tables), shard, num_shards));
}

EmbeddingStore::EmbeddingStore(const JobConfig& job,
                               std::vector<std::unique_ptr<EmbeddingTable>> tables, int shard,
                               int num_shards)
    : job_(job),
      tables_(std::move(tables)),
      row_layout_(LayoutOf(tables_), shard, num_shards),
      cuts_(Pointers(tables_), EmbeddingCuts::Options()),
      checkpoint_(Pointers(tables_), OptimizersOf(job_)) {}

double EmbeddingStore::LearningRate(int table, double dense) const {
  return EmbeddingLearningRate(job_, job_.model().embedding_tables(table).optimizer(), dense);
}

void EmbeddingStore::Apply(int64_t step, double dense_rate,
                           absl::Span<const RowContribution> contributions) {
  for (int i = 0; i < num_tables(); ++i) {
    ApplyRows({step, LearningRate(i, dense_rate)}, i, contributions, table(i));
  }
}

void EmbeddingStore::Clear(int64_t step) {
  checkpoint_.Forget();
  for (const auto& table : tables_) table->Clear(step);
}

std::vector<EmbeddingTableStatus> EmbeddingStore::Status() const {
  std::vector<EmbeddingTableStatus> all;
  for (const auto& table : tables_) {
    const EmbeddingTable::Stats stats = table->stats();
    EmbeddingTableStatus status;
    status.set_name(table->options().name);
    status.set_rows(stats.rows);
    status.set_waiting(stats.waiting);
    status.set_bytes(stats.bytes);
    status.set_created(stats.total.created);
    status.set_not_admitted(stats.total.not_admitted);
    status.set_refused(stats.total.refused);
    status.set_evicted(stats.total.evicted);
    all.push_back(std::move(status));
  }
  return all;
}

uint64_t EmbeddingStore::bytes() const {
  uint64_t bytes = cuts_.bytes();
  for (const auto& table : tables_) bytes += table->stats().bytes;
  return bytes;
}

}  // namespace codistill
