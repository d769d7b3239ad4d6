#ifndef CODISTILL_SERVER_EMBEDDING_STAGED_ROWS_H_
#define CODISTILL_SERVER_EMBEDDING_STAGED_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "server/aligned_buffer.h"
#include "server/embedding/embedding_table.h"

namespace codistill {

// What a push may bring for the rows of one shard: its tables, and the range of hashes that is its
// own. Thread-safe; outlives the pushes.
class RowLayout {
 public:
  struct Table {
    std::string name;
    int dim = 0;
  };
  RowLayout(std::vector<Table> tables, int shard, int num_shards);

  const std::vector<Table>& tables() const { return tables_; }
  // INVALID_ARGUMENT naming what is wrong and what would be right.
  absl::Status CheckTable(uint32_t table, uint32_t dim) const;
  // Whether all keys are of this shard, else INVALID_ARGUMENT naming the first that is not.
  absl::Status CheckKeys(uint32_t table, absl::Span<const uint64_t> keys) const;

  // Memory for the payload of one frame.
  std::shared_ptr<AlignedBuffer> NewBuffer(size_t bytes) const;

 private:
  const std::vector<Table> tables_;
  const int shard_;
  const int num_shards_;
  mutable BufferPool pool_;
};

// The rows of one push, as they came. Written by one call at a time, read once the push is
// complete.
class StagedRows {
 public:
  // Bytes of keys and gradients one push may stage on one shard.
  static constexpr uint64_t kMaxBytes = uint64_t{1} << 30;

  explicit StagedRows(const RowLayout* layout) : layout_(layout), parts_(layout->tables().size()) {}

  // Takes `count` keys and their gradients, which `copy` writes to where it is told: the keys, then
  // the gradients, `bytes` in all. INVALID_ARGUMENT: unknown table, wrong dim or length, a key of
  // another shard; RESOURCE_EXHAUSTED beyond kMaxBytes. After an error the push is of no use.
  absl::Status Add(uint32_t table, uint32_t dim, int64_t count, size_t bytes,
                   absl::FunctionRef<void(void*)> copy);

  // OK, or INVALID_ARGUMENT naming the first row whose gradient is not finite.
  const absl::Status& finite() const { return finite_; }
  bool empty() const { return bytes_ == 0; }
  uint64_t bytes() const { return bytes_; }

  struct Part {
    absl::Span<const uint64_t> keys;
    absl::Span<const float> gradients;
    std::shared_ptr<const AlignedBuffer> owner;
  };
  const std::vector<Part>& parts(int table) const { return parts_[table]; }

 private:
  const RowLayout* const layout_;
  std::vector<std::vector<Part>> parts_;  // by table
  uint64_t bytes_ = 0;
  absl::Status finite_;
};

// A push that counts in a step. Its rows may be null: none.
struct RowContribution {
  const StagedRows* rows = nullptr;
  double weight = 0;  // n_i / sum(n_i)
};

// Makes the next step of table `index`: its rows by the mean over contributions, sum(n_i g_i) /
// sum(n_i) for each key, summed in their order, where a key that is absent in one counts as 0.
EmbeddingTable::Counts ApplyRows(const EmbeddingTable::Update& update, int index,
                                 absl::Span<const RowContribution> contributions,
                                 EmbeddingTable* table);

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_STAGED_ROWS_H_
