#include "common/base/file.h"

#include <unistd.h>

#include <atomic>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "common/base/crc32c.h"
#include "common/base/random.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr size_t kBufferBytes = 64 << 10;
constexpr absl::string_view kTemporaryMark = ".tmp-";
constexpr size_t kTemporaryDigits = 16;

// Unlikely to be taken even where several hosts share the directory; CreateNew makes sure.
std::string TemporaryName(const std::string& path) {
  static std::atomic<uint64_t> counter{0};
  const uint64_t hash = Mix(static_cast<uint64_t>(absl::GetCurrentTimeNanos()),
                            static_cast<uint64_t>(getpid()), counter.fetch_add(1));
  return absl::StrCat(path, kTemporaryMark, absl::Hex(hash, absl::kZeroPad16));
}

absl::Status WriteAll(WritableFile* file, absl::string_view data) {
  CODISTILL_RETURN_IF_ERROR(file->Append(data));
  CODISTILL_RETURN_IF_ERROR(file->Sync());
  return file->Close();
}

}  // namespace

std::string JoinPath(absl::string_view dir, absl::string_view name) {
  if (dir.empty() || (!name.empty() && name[0] == '/')) return std::string(name);
  if (name.empty()) return std::string(dir);
  return absl::StrCat(dir, dir.back() == '/' ? "" : "/", name);
}

std::string DirName(absl::string_view path) {
  const size_t slash = path.rfind('/');
  if (slash == absl::string_view::npos) return ".";
  return std::string(path.substr(0, slash == 0 ? 1 : slash));
}

std::string BaseName(absl::string_view path) {
  const size_t slash = path.rfind('/');
  return std::string(slash == absl::string_view::npos ? path : path.substr(slash + 1));
}

bool IsTemporaryFile(absl::string_view path) {
  const size_t mark = path.rfind(kTemporaryMark);
  if (mark == absl::string_view::npos) return false;
  const absl::string_view digits = path.substr(mark + kTemporaryMark.size());
  if (digits.size() != kTemporaryDigits) return false;
  for (char digit : digits) {
    if (!absl::ascii_isxdigit(digit)) return false;
  }
  return true;
}

absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes,
                                     FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  if (file->size() > max_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "read ", path, ": is ", file->size(), " bytes long; at most ", max_bytes, " are allowed"));
  }
  std::string content(file->size(), '\0');
  CODISTILL_RETURN_IF_ERROR(file->ReadAt(0, content.size(), &content[0]));
  return content;
}

absl::Status WriteFileAtomically(const std::string& path, absl::string_view data,
                                 FileSystem* file_system) {
  const std::string temporary = TemporaryName(path);
  absl::Status status;
  {
    absl::StatusOr<std::unique_ptr<WritableFile>> file = file_system->CreateNew(temporary);
    if (!file.ok()) {
      // Nothing of ours is at the temporary path.
      return Annotate(file.status(),
                      absl::StrCat("while writing ", data.size(), " bytes to ", path));
    }
    status = WriteAll(file->get(), data);
  }
  if (status.ok()) status = file_system->Rename(temporary, path);
  if (!status.ok()) {
    file_system->RemoveFile(temporary).IgnoreError();  // the first error is the one to tell
  } else {
    status = file_system->SyncDir(DirName(path));
  }
  return Annotate(status, absl::StrCat("while writing ", data.size(), " bytes to ", path));
}

absl::Status CreateFileExclusively(const std::string& path, absl::string_view data,
                                   FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file, file_system->CreateNew(path));
  const absl::Status status = WriteAll(file.get(), data);
  if (!status.ok()) {
    file_system->RemoveFile(path).IgnoreError();
    return status;
  }
  return file_system->SyncDir(DirName(path));
}

absl::Status RemoveAll(const std::string& path, FileSystem* file_system) {
  // Unlinking first means that a symbolic link is gone before anyone could follow it.
  const absl::Status status = file_system->RemoveFile(path);
  if (status.ok() || absl::IsNotFound(status)) return absl::OkStatus();
  if (!file_system->IsDirectory(path)) return status;
  CODISTILL_ASSIGN_OR_RETURN(std::vector<std::string> names, file_system->ListDir(path));
  for (const std::string& name : names) {
    CODISTILL_RETURN_IF_ERROR(RemoveAll(JoinPath(path, name), file_system));
  }
  return file_system->RemoveDir(path);
}

absl::StatusOr<std::unique_ptr<FileWriter>> FileWriter::Create(const std::string& path,
                                                               FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<WritableFile> file, file_system->OpenForWrite(path));
  return std::unique_ptr<FileWriter>(new FileWriter(path, file_system, std::move(file)));
}

FileWriter::FileWriter(std::string path, FileSystem* file_system,
                       std::unique_ptr<WritableFile> file)
    : path_(std::move(path)), file_system_(file_system), file_(std::move(file)) {}

FileWriter::~FileWriter() {
  if (file_ != nullptr) Fail(absl::CancelledError("abandoned")).IgnoreError();
}

absl::Status FileWriter::Fail(const absl::Status& status) {
  status_ = Annotate(status, absl::StrCat("after ", bytes_, " bytes of ", path_));
  if (file_ != nullptr) {
    file_ = nullptr;
    file_system_->RemoveFile(path_).IgnoreError();
  }
  return status_;
}

absl::Status FileWriter::Flush() {
  const absl::Status status = file_->Append(buffer_);
  buffer_.clear();
  return status;
}

absl::Status FileWriter::Append(absl::string_view data) {
  CODISTILL_RETURN_IF_ERROR(Write(data));
  crc32c_ = Crc32cExtend(crc32c_, data);
  return absl::OkStatus();
}

absl::Status FileWriter::AppendSummed(absl::string_view data, uint32_t crc32c) {
  CODISTILL_RETURN_IF_ERROR(Write(data));
  crc32c_ = Crc32cConcat(crc32c_, crc32c, data.size());
  return absl::OkStatus();
}

absl::Status FileWriter::Write(absl::string_view data) {
  if (!status_.ok()) return status_;
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("append to ", path_, ": is closed"));
  }
  if (buffer_.size() + data.size() > kBufferBytes && !buffer_.empty()) {
    if (absl::Status status = Flush(); !status.ok()) return Fail(status);
  }
  if (data.size() > kBufferBytes) {
    if (absl::Status status = file_->Append(data); !status.ok()) return Fail(status);
  } else {
    buffer_.append(data.data(), data.size());
  }
  bytes_ += data.size();
  return absl::OkStatus();
}

absl::Status FileWriter::SyncAndClose() {
  if (!status_.ok()) return status_;
  if (file_ == nullptr) return absl::OkStatus();
  absl::Status status = Flush();
  if (status.ok()) status = file_->Sync();
  if (status.ok()) status = file_->Close();
  if (status.ok()) status = file_system_->SyncDir(DirName(path_));
  if (!status.ok()) return Fail(status);
  file_ = nullptr;
  return absl::OkStatus();
}

}  // namespace codistill
