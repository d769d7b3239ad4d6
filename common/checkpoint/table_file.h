#ifndef CODISTILL_COMMON_CHECKPOINT_TABLE_FILE_H_
#define CODISTILL_COMMON_CHECKPOINT_TABLE_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "proto/checkpoint.pb.h"

// The embedding tables of one shard in a checkpoint: a file with all rows (a base), or with what
// has changed since another file (a delta). docs/checkpoint_format.md describes the bytes.
namespace codistill {

// tables-<index>-of-<count>-<generation>-<step>-<attempt>.
std::string TableFileName(int shard, int num_shards, const Version& version, uint32_t attempt);

// Writes one file, record by record. Unless Finish returned OK, nothing is left behind.
class TableFileWriter {
 public:
  static absl::StatusOr<std::unique_ptr<TableFileWriter>> Create(
      const std::string& directory, const std::string& name, TableFileHeader header,
      FileSystem* file_system = FileSystem::Real());
  // A full disk is RESOURCE_EXHAUSTED and names the file.
  absl::Status Append(const TableRows& rows);
  // Makes the file durable.
  absl::StatusOr<CheckpointFile> Finish();

 private:
  TableFileWriter(std::string name, std::unique_ptr<FileWriter> writer)
      : name_(std::move(name)), writer_(std::move(writer)) {}
  absl::Status Record(const std::string& bytes);

  const std::string name_;
  const std::unique_ptr<FileWriter> writer_;
  uint64_t records_ = 0;
};

// Reads one file. All damage is DATA_LOSS and names the file and the place in it.
class TableFileReader {
 public:
  static absl::StatusOr<std::unique_ptr<TableFileReader>> Open(
      const std::string& path, FileSystem* file_system = FileSystem::Real());

  const TableFileHeader& header() const { return header_; }
  // False at the end, which has been checked then.
  absl::StatusOr<bool> Next(TableRows* rows);

 private:
  explicit TableFileReader(std::unique_ptr<ReadableFile> file) : file_(std::move(file)) {}
  absl::StatusOr<std::string> Record();

  const std::unique_ptr<ReadableFile> file_;
  TableFileHeader header_;
  uint64_t at_ = 0;
  uint64_t records_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_TABLE_FILE_H_
