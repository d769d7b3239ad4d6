#ifndef CODISTILL_COMMON_CHECKPOINT_SAFETENSORS_H_
#define CODISTILL_COMMON_CHECKPOINT_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/file.h"
#include "proto/model.pb.h"

namespace codistill {

// Reads safetensors files (8 bytes of header length, a JSON header, the data): initial weights and
// warm starts. Only what is asked for is read, so a shard touches its own pieces of a large file.
// The file is not trusted: every offset is checked before use. Thread-safe.
class SafetensorsReader {
 public:
  struct Entry {
    DataType dtype = DT_INVALID;
    std::vector<int64_t> shape;
    uint64_t begin = 0;  // of the data, in the file
    uint64_t bytes = 0;
  };

  // NOT_FOUND; DATA_LOSS when the file is damaged, cut short or none of this kind. All name the
  // file, and the tensor where one is at fault.
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> Open(
      const std::string& path, FileSystem* file_system = FileSystem::Real());

  // Null if there is none of that name.
  const Entry* Find(const std::string& name) const;
  const std::map<std::string, Entry>& entries() const { return entries_; }
  const std::string& path() const { return file_->path(); }

  // `n` bytes of a tensor's data, from byte `offset` of it. OUT_OF_RANGE beyond its end.
  absl::Status Read(const std::string& name, uint64_t offset, size_t n, void* to) const;

 private:
  explicit SafetensorsReader(std::unique_ptr<ReadableFile> file) : file_(std::move(file)) {}
  absl::Status ReadHeader();

  std::unique_ptr<ReadableFile> file_;
  std::map<std::string, Entry> entries_;
};

// One tensor to be written, and where its bytes (row-major, little-endian) come from: `read` fills
// all of them, once, when it is the tensor's turn.
struct SafetensorsItem {
  std::string name;
  DataType dtype = DT_INVALID;
  std::vector<int64_t> shape;
  std::function<absl::Status(char* to)> read;
};

// Writes a file that every reader of the format takes, tensor by tensor in the order given; one
// tensor at a time is in memory. Durable when this returns OK; on error there is no file.
// INVALID_ARGUMENT names a tensor that is there twice or whose type the format lacks.
absl::Status WriteSafetensors(const std::string& path, const std::vector<SafetensorsItem>& items,
                              const std::map<std::string, std::string>& metadata,
                              FileSystem* file_system = FileSystem::Real());

}  // namespace codistill

#endif  // CODISTILL_COMMON_CHECKPOINT_SAFETENSORS_H_
