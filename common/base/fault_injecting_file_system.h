// A file system that fails on demand.

#ifndef CODISTILL_COMMON_BASE_FAULT_INJECTING_FILE_SYSTEM_H_
#define CODISTILL_COMMON_BASE_FAULT_INJECTING_FILE_SYSTEM_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/base/file_system.h"
#include "common/base/mutex.h"

namespace codistill {

// Passes everything on to `base` except for the faults asked for. Thread-safe; faults may be
// changed at any time and hold for files already open.
class FaultInjectingFileSystem : public FileSystem {
 public:
  enum class Operation { kCreate, kOpenForRead, kSync, kClose, kRename, kRemoveFile, kSyncDir };

  explicit FaultInjectingFileSystem(FileSystem* base = FileSystem::Real()) : base_(base) {}

  // The next `bytes` written, over all files, succeed (the write that crosses the limit as a short
  // one); after that writes fail with `error_number` (an errno value, by default a full disk).
  void FailWritesAfter(uint64_t bytes, int error_number);
  void FailWritesAfter(uint64_t bytes);
  // No single write takes more than `bytes`.
  void ShortWrites(size_t bytes);
  // Every call of that kind on a path that contains `substring` fails.
  void Fail(Operation operation, int error_number, std::string substring = "");
  // Back to no faults; counters stay.
  void Heal();

  uint64_t bytes_written() const;
  // How often that kind of call was made, failed ones included.
  int calls(Operation operation) const;

  absl::StatusOr<std::unique_ptr<WritableFile>> OpenForWrite(const std::string& path) override;
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override;
  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenForRead(const std::string& path) override;
  absl::Status Rename(const std::string& from, const std::string& to) override;
  absl::Status RemoveFile(const std::string& path) override;
  absl::Status RemoveDir(const std::string& path) override;
  absl::Status SyncDir(const std::string& path) override;
  absl::Status MakeDirs(const std::string& path) override;
  absl::StatusOr<std::vector<std::string>> ListDir(const std::string& path) override;
  bool Exists(const std::string& path) override;
  bool IsDirectory(const std::string& path) override;

 private:
  class File;
  struct Fault {
    int error_number;
    std::string substring;
  };

  // Counts the call; the error when it is to fail.
  absl::Status Check(Operation operation, const std::string& path);
  absl::StatusOr<size_t> Write(WritableFile* file, absl::string_view data);
  absl::StatusOr<std::unique_ptr<WritableFile>> Wrap(
      absl::StatusOr<std::unique_ptr<WritableFile>> file);

  FileSystem* const base_;
  mutable Mutex mu_;
  uint64_t writable_bytes_ ABSL_GUARDED_BY(mu_) = UINT64_MAX;
  int write_error_ ABSL_GUARDED_BY(mu_) = 0;
  size_t max_write_ ABSL_GUARDED_BY(mu_) = SIZE_MAX;
  std::map<Operation, Fault> faults_ ABSL_GUARDED_BY(mu_);
  std::map<Operation, int> calls_ ABSL_GUARDED_BY(mu_);
  uint64_t bytes_written_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_FAULT_INJECTING_FILE_SYSTEM_H_
