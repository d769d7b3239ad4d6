#include "common/base/fault_injecting_file_system.h"

#include <errno.h>

#include <algorithm>
#include <utility>

#include "common/base/status.h"

namespace codistill {

class FaultInjectingFileSystem::File : public WritableFile {
 public:
  File(FaultInjectingFileSystem* file_system, std::unique_ptr<WritableFile> file)
      : file_system_(file_system), file_(std::move(file)) {}

  absl::StatusOr<size_t> Write(absl::string_view data) override {
    return file_system_->Write(file_.get(), data);
  }
  absl::Status Sync() override {
    CODISTILL_RETURN_IF_ERROR(file_system_->Check(Operation::kSync, path()));
    return file_->Sync();
  }
  absl::Status Close() override {
    CODISTILL_RETURN_IF_ERROR(file_system_->Check(Operation::kClose, path()));
    return file_->Close();
  }
  const std::string& path() const override { return file_->path(); }

 private:
  FaultInjectingFileSystem* const file_system_;
  const std::unique_ptr<WritableFile> file_;
};

void FaultInjectingFileSystem::FailWritesAfter(uint64_t bytes, int error_number) {
  MutexLock lock(&mu_);
  writable_bytes_ = bytes;
  write_error_ = error_number;
}

void FaultInjectingFileSystem::FailWritesAfter(uint64_t bytes) { FailWritesAfter(bytes, ENOSPC); }

void FaultInjectingFileSystem::ShortWrites(size_t bytes) {
  MutexLock lock(&mu_);
  max_write_ = bytes;
}

void FaultInjectingFileSystem::Fail(Operation operation, int error_number, std::string substring) {
  MutexLock lock(&mu_);
  faults_[operation] = {error_number, std::move(substring)};
}

void FaultInjectingFileSystem::Heal() {
  MutexLock lock(&mu_);
  writable_bytes_ = UINT64_MAX;
  max_write_ = SIZE_MAX;
  faults_.clear();
}

uint64_t FaultInjectingFileSystem::bytes_written() const {
  MutexLock lock(&mu_);
  return bytes_written_;
}

int FaultInjectingFileSystem::calls(Operation operation) const {
  MutexLock lock(&mu_);
  const auto found = calls_.find(operation);
  return found == calls_.end() ? 0 : found->second;
}

absl::Status FaultInjectingFileSystem::Check(Operation operation, const std::string& path) {
  MutexLock lock(&mu_);
  ++calls_[operation];
  const auto fault = faults_.find(operation);
  if (fault == faults_.end() || path.find(fault->second.substring) == std::string::npos) {
    return absl::OkStatus();
  }
  return FileError(fault->second.error_number, "injected fault at", path);
}

absl::StatusOr<size_t> FaultInjectingFileSystem::Write(WritableFile* file, absl::string_view data) {
  MutexLock lock(&mu_);
  if (!data.empty() && writable_bytes_ == 0) return FileError(write_error_, "write", file->path());
  const uint64_t n = std::min<uint64_t>({data.size(), max_write_, writable_bytes_});
  CODISTILL_ASSIGN_OR_RETURN(const size_t written, file->Write(data.substr(0, n)));
  if (writable_bytes_ != UINT64_MAX) writable_bytes_ -= written;
  bytes_written_ += written;
  return written;
}

absl::StatusOr<std::unique_ptr<WritableFile>> FaultInjectingFileSystem::Wrap(
    absl::StatusOr<std::unique_ptr<WritableFile>> file) {
  CODISTILL_RETURN_IF_ERROR(file);
  return std::make_unique<File>(this, std::move(*file));
}

absl::StatusOr<std::unique_ptr<WritableFile>> FaultInjectingFileSystem::OpenForWrite(
    const std::string& path) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kCreate, path));
  return Wrap(base_->OpenForWrite(path));
}

absl::StatusOr<std::unique_ptr<WritableFile>> FaultInjectingFileSystem::CreateNew(
    const std::string& path) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kCreate, path));
  return Wrap(base_->CreateNew(path));
}

absl::StatusOr<std::unique_ptr<ReadableFile>> FaultInjectingFileSystem::OpenForRead(
    const std::string& path) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kOpenForRead, path));
  return base_->OpenForRead(path);
}

absl::Status FaultInjectingFileSystem::Rename(const std::string& from, const std::string& to) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kRename, to));
  return base_->Rename(from, to);
}

absl::Status FaultInjectingFileSystem::RemoveFile(const std::string& path) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kRemoveFile, path));
  return base_->RemoveFile(path);
}

absl::Status FaultInjectingFileSystem::RemoveDir(const std::string& path) {
  return base_->RemoveDir(path);
}

absl::Status FaultInjectingFileSystem::SyncDir(const std::string& path) {
  CODISTILL_RETURN_IF_ERROR(Check(Operation::kSyncDir, path));
  return base_->SyncDir(path);
}

absl::Status FaultInjectingFileSystem::MakeDirs(const std::string& path) {
  return base_->MakeDirs(path);
}

absl::StatusOr<std::vector<std::string>> FaultInjectingFileSystem::ListDir(
    const std::string& path) {
  return base_->ListDir(path);
}

bool FaultInjectingFileSystem::Exists(const std::string& path) { return base_->Exists(path); }

bool FaultInjectingFileSystem::IsDirectory(const std::string& path) {
  return base_->IsDirectory(path);
}

}  // namespace codistill
