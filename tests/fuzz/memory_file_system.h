#ifndef CODISTILL_TESTS_FUZZ_MEMORY_FILE_SYSTEM_H_
#define CODISTILL_TESTS_FUZZ_MEMORY_FILE_SYSTEM_H_

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file_system.h"

namespace codistill {

// One file, whatever its path, to be read; for parsers that read files.
class MemoryFileSystem final : public FileSystem {
 public:
  void set_contents(std::string contents) { contents_ = std::move(contents); }

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenForRead(const std::string& path) override {
    return std::make_unique<File>(path, contents_);
  }

  absl::StatusOr<std::unique_ptr<WritableFile>> OpenForWrite(const std::string&) override {
    return ReadOnly();
  }
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string&) override {
    return ReadOnly();
  }
  absl::Status Rename(const std::string&, const std::string&) override { return ReadOnly(); }
  absl::Status RemoveFile(const std::string&) override { return ReadOnly(); }
  absl::Status RemoveDir(const std::string&) override { return ReadOnly(); }
  absl::Status SyncDir(const std::string&) override { return absl::OkStatus(); }
  absl::Status MakeDirs(const std::string&) override { return ReadOnly(); }
  absl::StatusOr<std::vector<std::string>> ListDir(const std::string&) override {
    return std::vector<std::string>();
  }
  bool Exists(const std::string&) override { return true; }
  bool IsDirectory(const std::string&) override { return false; }

 private:
  class File final : public ReadableFile {
   public:
    File(std::string path, std::string contents)
        : path_(std::move(path)), contents_(std::move(contents)) {}
    uint64_t size() const override { return contents_.size(); }
    absl::Status ReadAt(uint64_t offset, size_t n, char* buffer) const override {
      if (offset > contents_.size() || n > contents_.size() - offset) {
        return absl::OutOfRangeError(absl::StrCat(path_, ": ends before ", offset, " + ", n));
      }
      if (n > 0) std::memcpy(buffer, contents_.data() + offset, n);
      return absl::OkStatus();
    }
    const std::string& path() const override { return path_; }

   private:
    const std::string path_;
    const std::string contents_;
  };

  static absl::Status ReadOnly() { return absl::PermissionDeniedError("read only"); }

  std::string contents_;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_FUZZ_MEMORY_FILE_SYSTEM_H_
