#ifndef CODISTILL_COMMON_CHECKPOINT_SHARD_FILE_H_
#define CODISTILL_COMMON_CHECKPOINT_SHARD_FILE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/file.h"
#include "proto/checkpoint.pb.h"

// One shard's part of a checkpoint: a header that says what follows, and the data of the pieces.
// docs/checkpoint_format.md describes the bytes. Every byte of a file is covered by a checksum or a
// rule, so that none can change unnoticed.
namespace codistill {

// The file's name in its directory: shard-<index>-of-<count>-<generation>-<step>-<attempt>.
std::string ShardFileName(int shard, int num_shards, const Version& version, uint32_t attempt);

// One entry's data on its way to disk. The memory must stay unchanged until WriteShardFile returns.
struct ShardFileData {
  CheckpointEntry entry;  // piece, dtype, slot; the rest is filled in by the writer
  const void* data = nullptr;
  uint64_t bytes = 0;
  std::vector<absl::string_view>
      parts;  // if not empty, `bytes` in several places instead of `data`
};

// Writes the file and makes it durable. `identity` has everything of the header but the entries. On
// error nothing is left behind; a full disk is RESOURCE_EXHAUSTED and names the file.
absl::StatusOr<CheckpointFile> WriteShardFile(const std::string& directory, const std::string& name,
                                              CheckpointShardHeader identity,
                                              absl::Span<const ShardFileData> data,
                                              FileSystem* file_system = FileSystem::Real());

// Reads one file. Open checks the header and that the file has exactly the length its header
// implies; Read checks the entry. All damage is DATA_LOSS and names the file and the place in it.
// Thread-safe.
class ShardFileReader {
 public:
  static absl::StatusOr<std::unique_ptr<ShardFileReader>> Open(
      const std::string& path, FileSystem* file_system = FileSystem::Real());

  const CheckpointShardHeader& header() const { return header_; }

  // The data of entry `index` into `to`, which has room for its `bytes`.
  absl::Status Read(int index, void* to) const;
  // The same into several places, in order, with room for exactly its `bytes` together.
  absl::Status ReadParts(int index, absl::Span<const absl::Span<char>> parts) const;

  // Reads and checks everything, the padding between the entries included.
  absl::Status VerifyAll() const;

 private:
  explicit ShardFileReader(std::unique_ptr<ReadableFile> file) : file_(std::move(file)) {}
  absl::Status ReadHeader();
  absl::Status CheckPadding(uint64_t begin, uint64_t end) const;
  std::string EntryName(int index) const;

  std::unique_ptr<ReadableFile> file_;
  CheckpointShardHeader header_;
  uint64_t header_end_ = 0;  // of the header's bytes
  uint64_t data_begin_ = 0;  // of the data area, in the file
};

// Compares length and checksum of the whole file with what the manifest says. DATA_LOSS names the
// file.
absl::Status VerifyCheckpointFile(const std::string& directory, const CheckpointFile& expected,
                                  FileSystem* file_system = FileSystem::Real());

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_SHARD_FILE_H_
