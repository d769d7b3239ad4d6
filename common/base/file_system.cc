#include "common/base/file_system.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace codistill {
namespace {

// Linux transfers at most 2^31 - 4096 bytes a call; smaller pieces cost nothing.
constexpr size_t kMaxTransfer = size_t{1} << 30;

// A long file goes to the disk while it is being written, in stretches of this length, rather than
// all at the sync: the disk works from the start, and no more than kMaxUnwritten waits in memory
// that others need.
constexpr uint64_t kWritebackStretch = 8 << 20;
constexpr uint64_t kMaxUnwritten = 64 << 20;

// Retries a system call that a signal interrupted.
template <typename Call>
auto Retry(Call call) -> decltype(call()) {
  decltype(call()) result;
  do {
    result = call();
  } while (result == -1 && errno == EINTR);
  return result;
}

class PosixWritableFile : public WritableFile {
 public:
  PosixWritableFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~PosixWritableFile() override {
    if (fd_ >= 0) close(fd_);
  }

  absl::StatusOr<size_t> Write(absl::string_view data) override {
    if (fd_ < 0) return absl::FailedPreconditionError(absl::StrCat("write ", path_, ": is closed"));
    const ssize_t n =
        Retry([&] { return write(fd_, data.data(), std::min(data.size(), kMaxTransfer)); });
    if (n < 0) return FileError(errno, "write", path_);
    written_ += static_cast<uint64_t>(n);
    WriteBack();
    return static_cast<size_t>(n);
  }

  absl::Status Sync() override {
    if (fd_ < 0) return absl::FailedPreconditionError(absl::StrCat("sync ", path_, ": is closed"));
    if (Retry([&] { return fsync(fd_); }) != 0) return FileError(errno, "sync", path_);
    if (writeback_error_ != 0) return FileError(writeback_error_, "sync", path_);
    return absl::OkStatus();
  }

  absl::Status Close() override {
    if (fd_ < 0) return absl::OkStatus();
    // Not retried: Linux frees the descriptor even when it reports EINTR.
    const int result = close(std::exchange(fd_, -1));
    if (result != 0 && errno != EINTR) return FileError(errno, "close", path_);
    return absl::OkStatus();
  }

  const std::string& path() const override { return path_; }

 private:
  void WriteBack() {
#ifdef SYNC_FILE_RANGE_WRITE
    if (written_ - started_ < kWritebackStretch) return;
    SyncRange(started_, written_, SYNC_FILE_RANGE_WRITE);
    started_ = written_;
    if (started_ - waited_ <= kMaxUnwritten) return;
    const uint64_t done = started_ - kMaxUnwritten;
    SyncRange(waited_, done,
              SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
    waited_ = done;
#endif
  }

#ifdef SYNC_FILE_RANGE_WRITE
  void SyncRange(uint64_t begin, uint64_t end, unsigned int flags) {
    if (sync_file_range(fd_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), flags) ==
        0) {
      return;
    }
    // Linux reports an error of the disk once: what is told here, fsync tells no more. Where the
    // call is not served or was interrupted, fsync does it all.
    if (errno == EIO || errno == ENOSPC || errno == EDQUOT) writeback_error_ = errno;
  }
#endif

  int fd_;
  const std::string path_;
  uint64_t written_ = 0;  // bytes handed to the system
  uint64_t started_ = 0;  // of these, on their way to the disk
  uint64_t waited_ = 0;   // of these, there
  int writeback_error_ = 0;
};

class PosixReadableFile : public ReadableFile {
 public:
  PosixReadableFile(int fd, uint64_t size, std::string path)
      : fd_(fd), size_(size), path_(std::move(path)) {}
  ~PosixReadableFile() override { close(fd_); }

  uint64_t size() const override { return size_; }

  absl::Status ReadAt(uint64_t offset, size_t n, char* buffer) const override {
    for (size_t done = 0; done < n;) {
      const ssize_t got = Retry([&] {
        return pread(fd_, buffer + done, std::min(n - done, kMaxTransfer),
                     static_cast<off_t>(offset + done));
      });
      if (got < 0) return FileError(errno, "read", path_);
      if (got == 0) {
        return absl::OutOfRangeError(absl::StrCat("read ", path_, ": ends at byte ", offset + done,
                                                  "; ", n - done, " more bytes were expected"));
      }
      done += static_cast<size_t>(got);
    }
    return absl::OkStatus();
  }

  const std::string& path() const override { return path_; }

 private:
  const int fd_;
  const uint64_t size_;
  const std::string path_;
};

class PosixFileSystem : public FileSystem {
 public:
  absl::StatusOr<std::unique_ptr<WritableFile>> OpenForWrite(const std::string& path) override {
    return Create(path, O_TRUNC);
  }
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override {
    return Create(path, O_EXCL);
  }

  absl::StatusOr<std::unique_ptr<ReadableFile>> OpenForRead(const std::string& path) override {
    // O_NONBLOCK: opening a FIFO must not hang; it is refused below.
    const int fd = Retry([&] { return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
    if (fd < 0) return FileError(errno, "open", path);
    struct stat info;
    if (fstat(fd, &info) != 0) {
      const int error = errno;
      close(fd);
      return FileError(error, "stat", path);
    }
    if (!S_ISREG(info.st_mode)) {
      close(fd);
      return absl::FailedPreconditionError(absl::StrCat(
          "open ", path, S_ISDIR(info.st_mode) ? ": is a directory" : ": is not a regular file"));
    }
    return std::make_unique<PosixReadableFile>(fd, static_cast<uint64_t>(info.st_size), path);
  }

  absl::Status Rename(const std::string& from, const std::string& to) override {
    if (rename(from.c_str(), to.c_str()) != 0) {
      return FileError(errno, "rename", absl::StrCat(from, " to ", to));
    }
    return absl::OkStatus();
  }

  absl::Status RemoveFile(const std::string& path) override {
    if (unlink(path.c_str()) != 0) return FileError(errno, "remove", path);
    return absl::OkStatus();
  }

  absl::Status RemoveDir(const std::string& path) override {
    if (rmdir(path.c_str()) != 0) return FileError(errno, "remove directory", path);
    return absl::OkStatus();
  }

  absl::Status SyncDir(const std::string& path) override {
    const int fd = Retry([&] { return open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
    if (fd < 0) return FileError(errno, "open directory", path);
    const int result = Retry([&] { return fsync(fd); });
    const int error = errno;
    close(fd);
    // Some network file systems cannot sync directories and say EINVAL; they order renames
    // themselves.
    if (result != 0 && error != EINVAL) return FileError(error, "sync directory", path);
    return absl::OkStatus();
  }

  absl::Status MakeDirs(const std::string& path) override {
    if (path.empty()) return absl::InvalidArgumentError("make directory: the path is empty");
    for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
      const std::string prefix = path.substr(0, slash);
      if (mkdir(prefix.c_str(), 0777) != 0) {
        const int error = errno;
        // A parent on a read-only or foreign file system may exist without being ours to make.
        if (!IsDirectory(prefix)) {
          return FileError(error == EEXIST ? ENOTDIR : error, "make directory", prefix);
        }
      }
      if (slash == std::string::npos) return absl::OkStatus();
    }
  }

  absl::StatusOr<std::vector<std::string>> ListDir(const std::string& path) override {
    DIR* const dir = opendir(path.c_str());
    if (dir == nullptr) return FileError(errno, "list", path);
    std::vector<std::string> names;
    errno = 0;
    while (const dirent* entry = readdir(dir)) {
      const absl::string_view name = entry->d_name;
      if (name != "." && name != "..") names.emplace_back(name);
    }
    const int error = errno;
    closedir(dir);
    if (error != 0) return FileError(error, "list", path);
    std::sort(names.begin(), names.end());
    return names;
  }

  bool Exists(const std::string& path) override {
    struct stat info;
    return stat(path.c_str(), &info) == 0;
  }

  bool IsDirectory(const std::string& path) override {
    struct stat info;
    return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
  }

 private:
  static absl::StatusOr<std::unique_ptr<WritableFile>> Create(const std::string& path, int flag) {
    const int fd =
        Retry([&] { return open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flag, 0666); });
    if (fd < 0) return FileError(errno, "create", path);
    return std::make_unique<PosixWritableFile>(fd, path);
  }
};

}  // namespace

absl::Status FileError(int error_number, absl::string_view action, absl::string_view path) {
  if (error_number == EDQUOT || error_number == EFBIG) {  // absl makes EFBIG an OUT_OF_RANGE
    return absl::ResourceExhaustedError(
        absl::StrCat(action, " ", path, ": ", std::strerror(error_number)));
  }
  return absl::ErrnoToStatus(error_number, absl::StrCat(action, " ", path));
}

absl::Status WritableFile::Append(absl::string_view data) {
  for (size_t done = 0; done < data.size();) {
    absl::StatusOr<size_t> n = Write(data.substr(done));
    if (n.ok() && *n > 0) {
      done += *n;
      continue;
    }
    const absl::Status status =
        n.ok() ? absl::InternalError(absl::StrCat("write ", path(), ": no progress")) : n.status();
    return absl::Status(status.code(), absl::StrCat(status.message(), " (", done, " of ",
                                                    data.size(), " bytes written)"));
  }
  return absl::OkStatus();
}

FileSystem* FileSystem::Real() {
  static FileSystem* const file_system = new PosixFileSystem;
  return file_system;
}

}  // namespace codistill
