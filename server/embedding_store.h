#ifndef CODISTILL_SERVER_EMBEDDING_STORE_H_
#define CODISTILL_SERVER_EMBEDDING_STORE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "server/embedding/embedding_table.h"
#include "server/embedding/staged_rows.h"
#include "server/embedding_checkpoint.h"
#include "server/embedding_cuts.h"

namespace codistill {

// The embedding tables of one shard, as the job describes them, and their cuts. As in ShardStore,
// one thread at a time calls what changes something; the rest is thread-safe.
class EmbeddingStore {
 public:
  // INVALID_ARGUMENT names the table and the field.
  static absl::StatusOr<std::unique_ptr<EmbeddingStore>> Create(const JobConfig& job, int group,
                                                                int shard, int num_shards);

  int num_tables() const { return static_cast<int>(tables_.size()); }
  bool empty() const { return tables_.empty(); }
  EmbeddingTable* table(int index) { return tables_[index].get(); }
  const EmbeddingTable& table(int index) const { return *tables_[index]; }
  int64_t dim(int index) const { return tables_[index]->dim(); }

  // What pushes may bring.
  const RowLayout& row_layout() const { return row_layout_; }

  // Makes step `step` of every table from the pushes that count in it, in their order; `dense_rate`
  // is the learning rate of the dense parameters.
  void Apply(int64_t step, double dense_rate, absl::Span<const RowContribution> contributions);

  // Learning rate of a table's rows where the dense one is `dense`.
  double LearningRate(int table, double dense) const;

  // Forgets all rows; the tables are at `step`.
  void Clear(int64_t step);

  EmbeddingCuts* cuts() { return &cuts_; }
  EmbeddingCheckpoint* checkpoint() { return &checkpoint_; }

  // Rows, memory, admissions and evictions, by table.
  std::vector<EmbeddingTableStatus> Status() const;
  uint64_t bytes() const;

 private:
  EmbeddingStore(const JobConfig& job, std::vector<std::unique_ptr<EmbeddingTable>> tables,
                 int shard, int num_shards);

  const JobConfig job_;
  const std::vector<std::unique_ptr<EmbeddingTable>> tables_;
  const RowLayout row_layout_;
  EmbeddingCuts cuts_;
  EmbeddingCheckpoint checkpoint_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_STORE_H_
