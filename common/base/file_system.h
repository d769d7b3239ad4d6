// Files behind an interface, so that tests can run out of disk space at will. See file.h for what
// to call, fault_injecting_file_system.h for the fake.

#ifndef CODISTILL_COMMON_BASE_FILE_SYSTEM_H_
#define CODISTILL_COMMON_BASE_FILE_SYSTEM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// A file being written from its beginning. Not thread-safe.
class WritableFile {
 public:
  // Closes without syncing, ignoring errors, if Close() was not called.
  virtual ~WritableFile() = default;

  // Writes a prefix of `data` and returns its length, at least 1 unless `data` is empty; less than
  // all is no error. Most callers want Append.
  virtual absl::StatusOr<size_t> Write(absl::string_view data) = 0;
  // Makes everything written durable.
  virtual absl::Status Sync() = 0;
  virtual absl::Status Close() = 0;

  // Writes all of `data` or fails, saying how much of it was written.
  absl::Status Append(absl::string_view data);

  virtual const std::string& path() const = 0;
};

// A file open for reading at any place. Thread-safe.
class ReadableFile {
 public:
  virtual ~ReadableFile() = default;

  virtual uint64_t size() const = 0;  // in bytes, when it was opened
  // Reads exactly `n` bytes at `offset` into `buffer`. OUT_OF_RANGE when the file ends before.
  virtual absl::Status ReadAt(uint64_t offset, size_t n, char* buffer) const = 0;

  virtual const std::string& path() const = 0;
};

// Every error names the path at fault and, where there is one, the system's reason; codes are those
// of absl::ErrnoToStatusCode (NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, ...), with
// RESOURCE_EXHAUSTED for a full disk or quota. Thread-safe.
class FileSystem {
 public:
  virtual ~FileSystem() = default;

  // Creates or truncates.
  virtual absl::StatusOr<std::unique_ptr<WritableFile>> OpenForWrite(const std::string& path) = 0;
  // ALREADY_EXISTS when there is something at `path`: of several racing callers, one succeeds.
  virtual absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) = 0;
  // Regular files only: a directory gives FAILED_PRECONDITION.
  virtual absl::StatusOr<std::unique_ptr<ReadableFile>> OpenForRead(const std::string& path) = 0;

  // Replaces `to` atomically. Durable only after SyncDir of its directory.
  virtual absl::Status Rename(const std::string& from, const std::string& to) = 0;
  virtual absl::Status RemoveFile(const std::string& path) = 0;
  // Removes an empty directory.
  virtual absl::Status RemoveDir(const std::string& path) = 0;
  // Makes creations, renames and removals in the directory durable.
  virtual absl::Status SyncDir(const std::string& path) = 0;
  // Creates the directory and its missing parents; fine when it exists.
  virtual absl::Status MakeDirs(const std::string& path) = 0;
  // Names (not paths) in the directory, sorted, without "." and "..".
  virtual absl::StatusOr<std::vector<std::string>> ListDir(const std::string& path) = 0;
  // Whether anything that can be reached is at the path (symbolic links are followed).
  virtual bool Exists(const std::string& path) = 0;
  virtual bool IsDirectory(const std::string& path) = 0;

  // The disks of this machine. Never null, never destroyed.
  static FileSystem* Real();
};

// "action path: reason" for an errno value, with the code absl gives it.
absl::Status FileError(int error_number, absl::string_view action, absl::string_view path);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_FILE_SYSTEM_H_
