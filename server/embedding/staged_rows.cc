#include "server/embedding/staged_rows.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/embedding/row_placement.h"
#include "server/embedding/row_kernels.h"
#include "server/embedding/row_sum.h"

namespace codistill {
namespace {

// A frame's payload is about 1 MiB; what is larger is possible and gets memory of its own.
constexpr size_t kBufferBytes = (size_t{1} << 20) + (64 << 10);
constexpr size_t kFreeBuffers = 64;

}  // namespace

RowLayout::RowLayout(std::vector<Table> tables, int shard, int num_shards)
    : tables_(std::move(tables)),
      shard_(shard),
      num_shards_(num_shards),
      pool_(kBufferBytes, kFreeBuffers) {}

absl::Status RowLayout::CheckTable(uint32_t table, uint32_t dim) const {
  if (table >= tables_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("embedding table ", table, " is none of the job's ", tables_.size()));
  }
  if (dim != static_cast<uint32_t>(tables_[table].dim)) {
    return absl::InvalidArgumentError(absl::StrCat("embedding table ", tables_[table].name,
                                                   ": rows of ", dim, " floats; ",
                                                   tables_[table].dim, " would be right"));
  }
  return absl::OkStatus();
}

absl::Status RowLayout::CheckKeys(uint32_t table, absl::Span<const uint64_t> keys) const {
  if (num_shards_ == 1) return absl::OkStatus();
  for (const uint64_t key : keys) {
    const int shard = ShardOfKey(key, num_shards_);
    if (shard == shard_) continue;
    return absl::InvalidArgumentError(absl::StrCat("embedding table ", tables_[table].name,
                                                   ": key ", key, " belongs to shard ", shard,
                                                   ", not to shard ", shard_));
  }
  return absl::OkStatus();
}

std::shared_ptr<AlignedBuffer> RowLayout::NewBuffer(size_t bytes) const {
  return bytes <= kBufferBytes ? pool_.Get() : std::make_shared<AlignedBuffer>(bytes);
}

absl::Status StagedRows::Add(uint32_t table, uint32_t dim, int64_t count, size_t bytes,
                             absl::FunctionRef<void(void*)> copy) {
  if (absl::Status status = layout_->CheckTable(table, dim); !status.ok()) return status;
  const std::string& name = layout_->tables()[table].name;
  const size_t row_bytes = sizeof(uint64_t) + dim * sizeof(float);
  if (count < 0 || static_cast<uint64_t>(count) != bytes / row_bytes || bytes % row_bytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("embedding table ", name, ": ", count, " keys with rows of ", dim,
                     " floats came with ", bytes, " bytes; ", row_bytes, " a key are right"));
  }
  if (bytes > kMaxBytes - bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat("embedding table ", name,
                                                     ": a push of more than ", kMaxBytes,
                                                     " bytes of keys and gradients to one shard"));
  }
  if (count == 0) return absl::OkStatus();
  const std::shared_ptr<AlignedBuffer> buffer = layout_->NewBuffer(bytes);
  copy(buffer->data());
  Part part;
  part.keys = absl::MakeConstSpan(reinterpret_cast<const uint64_t*>(buffer->data()), count);
  part.gradients = absl::MakeConstSpan(
      reinterpret_cast<const float*>(buffer->data() + count * sizeof(uint64_t)), count * dim);
  part.owner = buffer;
  if (absl::Status status = layout_->CheckKeys(table, part.keys); !status.ok()) return status;
  if (finite_.ok() && !internal::AllFinite(part.gradients.data(), count * dim)) {
    int64_t row = 0;
    while (internal::AllFinite(part.gradients.data() + row * dim, dim)) ++row;
    finite_ = absl::InvalidArgumentError(absl::StrCat(
        "embedding table ", name, ": gradient of key ", part.keys[row], " is not finite"));
  }
  bytes_ += bytes;
  parts_[table].push_back(std::move(part));
  return absl::OkStatus();
}

EmbeddingTable::Counts ApplyRows(const EmbeddingTable::Update& update, int index,
                                 absl::Span<const RowContribution> contributions,
                                 EmbeddingTable* table) {
  std::vector<EmbeddingTable::Batch> batches;
  if (contributions.size() == 1 && contributions[0].weight == 1) {
    if (contributions[0].rows != nullptr) {
      for (const StagedRows::Part& part : contributions[0].rows->parts(index)) {
        batches.push_back({part.keys, part.gradients});
      }
    }
    return table->Apply(update, batches);
  }
  RowSum sum(table->dim());
  for (const RowContribution& contribution : contributions) {
    if (contribution.rows == nullptr) continue;
    for (const StagedRows::Part& part : contribution.rows->parts(index)) {
      sum.Add(part.keys, part.gradients, static_cast<float>(contribution.weight));
    }
  }
  batches.push_back({sum.keys(), sum.rows()});
  return table->Apply(update, batches);
}

}  // namespace codistill
