// What the rest of the project does with files. Every function takes the FileSystem to act on, by
// default the real one.

#ifndef CODISTILL_COMMON_BASE_FILE_H_
#define CODISTILL_COMMON_BASE_FILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file_system.h"

namespace codistill {

// "a/b" from "a" and "b"; `name` alone when it is absolute or `dir` is empty.
std::string JoinPath(absl::string_view dir, absl::string_view name);
template <typename... More>
std::string JoinPath(absl::string_view dir, absl::string_view name, const More&... more) {
  return JoinPath(JoinPath(dir, name), more...);
}

// The directory part: "a" of "a/b", "/" of "/b", "." of "b".
std::string DirName(absl::string_view path);
// What follows the last slash.
std::string BaseName(absl::string_view path);

// The whole file. RESOURCE_EXHAUSTED, naming both sizes, when it is longer than `max_bytes`: a
// wrong path must not fill the memory.
absl::StatusOr<std::string> ReadFile(const std::string& path, size_t max_bytes,
                                     FileSystem* file_system = FileSystem::Real());

// Replaces the file by `data` so that, whatever happens, the path afterwards holds the old content
// or all of the new: temporary file in the same directory, sync, rename, sync of the directory. On
// failure the temporary is removed and the error says how many bytes were to be written where
// (RESOURCE_EXHAUSTED: disk full). If only the last sync fails, the new content is in place but may
// not survive a power cut. Concurrent writers of one path in different processes are safe; the last
// rename wins. The temporary is called "<path>.tmp-<16 hex digits>"; one left behind by a killed
// process is recognised by IsTemporaryFile.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view data,
                                 FileSystem* file_system = FileSystem::Real());

// Whether a name or path is one that WriteFileAtomically gives its temporaries.
bool IsTemporaryFile(absl::string_view path);

// Creates the file with `data`, durably. ALREADY_EXISTS when it is there: the claim file of an
// exclusive owner.
absl::Status CreateFileExclusively(const std::string& path, absl::string_view data,
                                   FileSystem* file_system = FileSystem::Real());

// Removes a file, or a directory with what is in it; fine when there is nothing. Symbolic links are
// removed, never followed.
absl::Status RemoveAll(const std::string& path, FileSystem* file_system = FileSystem::Real());

// Writes a new file piece by piece, summing it as it goes. Unless SyncAndClose returned OK, the
// partial file is removed: by the failing call or by the destructor. Small pieces are gathered;
// large ones go straight to the file. Not thread-safe.
class FileWriter {
 public:
  // Creates or truncates the file.
  static absl::StatusOr<std::unique_ptr<FileWriter>> Create(
      const std::string& path, FileSystem* file_system = FileSystem::Real());
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  // After an error every later call returns that error.
  absl::Status Append(absl::string_view data);
  // The same for data whose checksum the caller has already: it is not summed again.
  absl::Status AppendSummed(absl::string_view data, uint32_t crc32c);
  // Everything is durable when this returns OK, the directory entry included.
  absl::Status SyncAndClose();

  uint64_t bytes() const { return bytes_; }    // appended so far
  uint32_t crc32c() const { return crc32c_; }  // of the bytes appended so far
  const std::string& path() const { return path_; }

 private:
  FileWriter(std::string path, FileSystem* file_system, std::unique_ptr<WritableFile> file);
  absl::Status Write(absl::string_view data);
  absl::Status Flush();
  absl::Status Fail(const absl::Status& status);

  const std::string path_;
  FileSystem* const file_system_;
  std::unique_ptr<WritableFile> file_;  // null once closed or failed
  std::string buffer_;
  uint64_t bytes_ = 0;
  uint32_t crc32c_ = 0;
  absl::Status status_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_FILE_H_
