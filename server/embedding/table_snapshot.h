#ifndef CODISTILL_SERVER_EMBEDDING_TABLE_SNAPSHOT_H_
#define CODISTILL_SERVER_EMBEDDING_TABLE_SNAPSHOT_H_

#include <cstddef>
#include <cstdint>

#include "server/embedding/embedding_table.h"

namespace codistill {

// A row last touched after the snapshot's step is no part of it as it is now; what it was then was
// set aside when it was about to change, unless its segment had been passed by then.
class EmbeddingTable::SnapshotImpl final : public EmbeddingTable::Snapshot {
 public:
  // `bit`: of Segment::passed, which no other snapshot has. All fields but `abandoned_` are guarded
  // by the table's lock, or are the reader's own.
  SnapshotImpl(EmbeddingTable* table, int64_t step, int64_t since, uint32_t floor, uint32_t bit)
      : table_(table), step_(step), since_(since), floor_(floor), bit_(bit) {}
  ~SnapshotImpl() override;

  int64_t step() const override { return step_; }
  bool Next(Rows* rows) override;

  // With the table's lock held: `entry` is about to be used at step `use`, or to go.
  void SetAside(const Entry& entry, const RowIndex::Segment& segment, uint32_t use);
  // The table was cleared: what was not read is lost, Next ends.
  void Abandon() {
    abandoned_ = true;
    aside_.clear();
  }
  uint32_t bit() const { return bit_; }

 private:
  bool Wanted(const Entry& entry) const;
  void Append(const Entry& entry, Rows* rows) const;

  EmbeddingTable* const table_;
  const int64_t step_;
  const int64_t since_;
  const uint32_t floor_;
  const uint32_t bit_;
  bool abandoned_ = false;
  size_t next_segment_ = 0;
  Rows aside_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_TABLE_SNAPSHOT_H_
