#include "worker/data/line_reader.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "zlib.h"

namespace codistill {
namespace {

constexpr size_t kBlock = size_t{256} << 10;
constexpr size_t kMaxLine = size_t{16} << 20;

}  // namespace

// Bytes of the text, decompressed where need be.
class LineReader::Source {
 public:
  virtual ~Source() = default;
  // Appends some bytes to `buffer`; false when there are no more.
  virtual absl::StatusOr<bool> Read(std::string* buffer) = 0;

  class Plain;
  class Gzip;
};

class LineReader::Source::Plain : public Source {
 public:
  explicit Plain(std::unique_ptr<ReadableFile> file) : file_(std::move(file)) {}

  absl::StatusOr<bool> Read(std::string* buffer) override {
    const size_t n = static_cast<size_t>(std::min<uint64_t>(kBlock, file_->size() - offset_));
    if (n == 0) return false;
    const size_t before = buffer->size();
    buffer->resize(before + n);
    CODISTILL_RETURN_IF_ERROR(file_->ReadAt(offset_, n, &(*buffer)[before]));
    offset_ += n;
    return true;
  }

 private:
  const std::unique_ptr<ReadableFile> file_;
  uint64_t offset_ = 0;
};

class LineReader::Source::Gzip : public Source {
 public:
  explicit Gzip(std::unique_ptr<ReadableFile> file)
      : path_(file->path()), compressed_(std::move(file)) {
    constexpr int kGzipOnly = 16 + MAX_WBITS;
    initialized_ = inflateInit2(&stream_, kGzipOnly) == Z_OK;
  }
  ~Gzip() override {
    if (initialized_) inflateEnd(&stream_);
  }

  absl::StatusOr<bool> Read(std::string* buffer) override {
    if (!initialized_) return absl::ResourceExhaustedError("zlib has no memory");
    const size_t before = buffer->size();
    buffer->resize(before + kBlock);
    stream_.next_out = reinterpret_cast<Bytef*>(&(*buffer)[before]);
    stream_.avail_out = kBlock;
    const absl::Status status = Fill();
    buffer->resize(before + kBlock - stream_.avail_out);
    CODISTILL_RETURN_IF_ERROR(status);
    return buffer->size() > before;
  }

 private:
  // Decompresses until the room for output is full or the file ends.
  absl::Status Fill() {
    while (stream_.avail_out > 0) {
      if (stream_.avail_in == 0) {
        input_.clear();
        CODISTILL_ASSIGN_OR_RETURN(const bool more, compressed_.Read(&input_));
        if (!more) {
          if (!inside_member_) return absl::OkStatus();
          return absl::DataLossError(absl::StrCat(path_, ": truncated: the gzip data end after ",
                                                  consumed_, " bytes without a trailer"));
        }
        stream_.next_in = reinterpret_cast<Bytef*>(&input_[0]);
        stream_.avail_in = static_cast<uInt>(input_.size());
      }
      if (!inside_member_) {  // a further gzip file may follow directly
        inflateReset(&stream_);
        inside_member_ = true;
      }
      const uInt available = stream_.avail_in;
      const int result = inflate(&stream_, Z_NO_FLUSH);
      consumed_ += available - stream_.avail_in;
      if (result == Z_STREAM_END) {
        inside_member_ = false;
      } else if (result != Z_OK) {
        return absl::DataLossError(
            absl::StrCat(path_, ": damaged or no gzip file, at byte ", consumed_, " (",
                         stream_.msg != nullptr ? stream_.msg : "zlib error", ")"));
      }
    }
    return absl::OkStatus();
  }

  const std::string path_;
  Plain compressed_;
  std::string input_;
  z_stream stream_{};
  bool initialized_ = false;
  bool inside_member_ = true;  // an empty file is a truncated one
  uint64_t consumed_ = 0;
};

absl::StatusOr<std::unique_ptr<LineReader>> LineReader::Open(const std::string& path,
                                                             FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  std::unique_ptr<Source> source;
  if (absl::EndsWith(path, ".gz")) {
    source = std::make_unique<Source::Gzip>(std::move(file));
  } else {
    source = std::make_unique<Source::Plain>(std::move(file));
  }
  return std::unique_ptr<LineReader>(new LineReader(path, std::move(source)));
}

LineReader::LineReader(std::string path, std::unique_ptr<Source> source)
    : path_(std::move(path)), source_(std::move(source)) {}

LineReader::~LineReader() = default;

absl::StatusOr<bool> LineReader::Next(absl::string_view* line) {
  size_t searched = begin_;
  while (true) {
    const size_t end = buffer_.find('\n', searched);
    if (end != std::string::npos) {
      *line = absl::string_view(buffer_).substr(begin_, end - begin_);
      begin_ = end + 1;
      break;
    }
    if (at_end_) {
      if (begin_ == buffer_.size()) return false;
      *line = absl::string_view(buffer_).substr(begin_);
      begin_ = buffer_.size();
      break;
    }
    buffer_.erase(0, begin_);
    begin_ = 0;
    searched = buffer_.size();
    if (buffer_.size() > kMaxLine) {
      return absl::InvalidArgumentError(absl::StrCat(path_, ":", line_number_ + 1,
                                                     ": a line of more than ", kMaxLine,
                                                     " bytes; a text file would be right"));
    }
    CODISTILL_ASSIGN_OR_RETURN(const bool more, source_->Read(&buffer_));
    at_end_ = !more;
  }
  ++line_number_;
  absl::ConsumeSuffix(line, "\r");
  return true;
}

std::string LineReader::place() const { return absl::StrCat(path_, ":", line_number_); }

}  // namespace codistill
