#ifndef CODISTILL_WORKER_DATA_LINE_READER_H_
#define CODISTILL_WORKER_DATA_LINE_READER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/base/file.h"

namespace codistill {

// Reads a text file line by line in constant memory; one whose name ends in ".gz" is decompressed
// on the way. Not thread-safe.
//
//   while (true) {
//     CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&line));
//     if (!more) break;
//   }
class LineReader {
 public:
  static absl::StatusOr<std::unique_ptr<LineReader>> Open(
      const std::string& path, FileSystem* file_system = FileSystem::Real());
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // The next line, without its end ("\n" or "\r\n"), valid until the next call; the last one needs
  // no end. False after it. DATA_LOSS: the compressed file is truncated or damaged.
  // INVALID_ARGUMENT: a line is longer than 16 MiB, so this is no text file.
  absl::StatusOr<bool> Next(absl::string_view* line);

  // Of the line read last, from 1.
  int64_t line_number() const { return line_number_; }
  // "path:line" of it.
  std::string place() const;
  const std::string& path() const { return path_; }

 private:
  class Source;
  LineReader(std::string path, std::unique_ptr<Source> source);

  const std::string path_;
  const std::unique_ptr<Source> source_;
  std::string buffer_;  // bytes read; lines before `begin_` were handed out
  size_t begin_ = 0;
  bool at_end_ = false;
  int64_t line_number_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_LINE_READER_H_
