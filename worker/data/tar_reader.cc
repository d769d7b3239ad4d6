#include "worker/data/tar_reader.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr uint64_t kBlock = 512;
constexpr uint64_t kMaxExtendedHeader = uint64_t{1} << 20;  // long names and pax records

// POSIX.1-2001 "ustar Interchange Format": a header is one block of text fields.
struct Field {
  size_t offset;
  size_t size;
};
constexpr Field kName{0, 100}, kSize{124, 12}, kChecksum{148, 8}, kMagic{257, 5}, kPrefix{345, 155};
constexpr size_t kType = 156;

absl::string_view Raw(const char* header, Field field) {
  return absl::string_view(header + field.offset, field.size);
}

// Up to the first NUL.
absl::string_view Text(absl::string_view raw) { return raw.substr(0, raw.find('\0')); }

// Octal digits, or GNU's big-endian binary where the first bit is set.
std::optional<uint64_t> Number(absl::string_view raw) {
  uint64_t value = 0;
  if (static_cast<unsigned char>(raw[0]) & 0x80) {
    for (size_t i = 0; i < raw.size(); ++i) {
      const auto byte = static_cast<unsigned char>(i == 0 ? raw[i] & 0x7f : raw[i]);
      if (value >> 56 != 0) return std::nullopt;
      value = value << 8 | byte;
    }
    return value;
  }
  absl::string_view text = Text(raw);
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  for (const char digit : text) {
    if (digit < '0' || digit > '7') return std::nullopt;
    value = value << 3 | static_cast<uint64_t>(digit - '0');
  }
  return value;
}

bool ChecksumMatches(const char* header) {
  uint64_t sum = 0;
  for (size_t i = 0; i < kBlock; ++i) {
    const bool in_checksum = i >= kChecksum.offset && i < kChecksum.offset + kChecksum.size;
    sum += in_checksum ? ' ' : static_cast<unsigned char>(header[i]);
  }
  return Number(Raw(header, kChecksum)) == sum;
}

// What a pax extended header changes about the entry that follows it.
struct Override {
  std::optional<std::string> name;
  std::optional<uint64_t> size;
};

// Records "LENGTH KEY=VALUE\n".
bool ParsePax(absl::string_view text, Override* override) {
  while (!text.empty() && text.front() != '\0') {
    const size_t space = text.find(' ');
    size_t length = 0;
    if (space == absl::string_view::npos || !absl::SimpleAtoi(text.substr(0, space), &length) ||
        length <= space + 1 || length > text.size() || text[length - 1] != '\n') {
      return false;
    }
    const absl::string_view record = text.substr(space + 1, length - space - 2);
    const size_t equals = record.find('=');
    if (equals == absl::string_view::npos) return false;
    const absl::string_view key = record.substr(0, equals), value = record.substr(equals + 1);
    if (key == "path") override->name = std::string(value);
    if (key == "size") {
      uint64_t size = 0;
      if (!absl::SimpleAtoi(value, &size)) return false;
      override->size = size;
    }
    text.remove_prefix(length);
  }
  return true;
}

// Headers are read through a window: one system call serves hundreds of small entries.
class Window {
 public:
  explicit Window(const ReadableFile& file) : file_(file) {}

  // `n` bytes at `offset`, valid until the next call. The range must lie in the file.
  absl::StatusOr<absl::string_view> Read(uint64_t offset, size_t n) {
    constexpr uint64_t kWindow = uint64_t{1} << 20;
    if (offset < begin_ || offset + n > begin_ + bytes_.size()) {
      const uint64_t length = std::min(std::max<uint64_t>(kWindow, n), file_.size() - offset);
      bytes_.resize(static_cast<size_t>(length));
      begin_ = offset;
      CODISTILL_RETURN_IF_ERROR(file_.ReadAt(offset, bytes_.size(), &bytes_[0]));
    }
    return absl::string_view(bytes_).substr(static_cast<size_t>(offset - begin_), n);
  }

 private:
  const ReadableFile& file_;
  std::string bytes_;
  uint64_t begin_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<TarEntry>> ListTar(const ReadableFile& archive) {
  const auto error = [&archive](uint64_t offset, absl::string_view problem) {
    return absl::DataLossError(absl::StrCat(archive.path(), ": at byte ", offset, ": ", problem));
  };
  Window window(archive);
  std::vector<TarEntry> entries;
  Override next;
  uint64_t offset = 0;
  while (true) {
    const std::string after = entries.empty() ? "" : absl::StrCat(" after ", entries.back().name);
    if (archive.size() - offset < kBlock) {
      return error(offset, absl::StrCat("truncated: the archive ends without its end mark", after));
    }
    CODISTILL_ASSIGN_OR_RETURN(const absl::string_view block, window.Read(offset, kBlock));
    if (block.find_first_not_of('\0') == absl::string_view::npos) return entries;
    char header[kBlock];
    std::memcpy(header, block.data(), kBlock);
    const std::optional<uint64_t> field_size = Number(Raw(header, kSize));
    if (Raw(header, kMagic) != "ustar" || !ChecksumMatches(header) || !field_size) {
      return error(offset, absl::StrCat("damaged header, or no tar archive", after));
    }

    const char type = header[kType];
    const bool extended = type == 'L' || type == 'K' || type == 'x' || type == 'g';
    std::string name;
    if (next.name && !extended) {
      name = *next.name;
    } else {
      name = std::string(Text(Raw(header, kName)));
      // GNU uses the place of the prefix for other things; its magic ends in a blank.
      const absl::string_view prefix = Text(Raw(header, kPrefix));
      if (header[kMagic.offset + kMagic.size] == '\0' && !prefix.empty()) {
        name = absl::StrCat(prefix, "/", name);
      }
    }
    const uint64_t size = next.size && !extended ? *next.size : *field_size;
    const uint64_t data = offset + kBlock;
    // Links and devices have no content, whatever their size field says.
    const bool has_content = type == '0' || type == '\0' || type == '7' || extended;
    if (has_content && size > archive.size() - data) {
      return error(offset, absl::StrCat("truncated: entry ", name, " has ", size,
                                        " bytes, but the file ends after ", archive.size() - data));
    }
    if (type == 'S')
      return error(offset, absl::StrCat("entry ", name,
                                        " is sparse, which is not "
                                        "supported"));

    if (extended) {
      if (size > kMaxExtendedHeader) {
        return error(offset, absl::StrCat("impossible extended header of ", size, " bytes"));
      }
      CODISTILL_ASSIGN_OR_RETURN(const absl::string_view content,
                                 window.Read(data, static_cast<size_t>(size)));
      if (type == 'L') next.name = std::string(Text(content));
      if (type == 'x' && !ParsePax(content, &next)) {
        return error(offset, absl::StrCat("damaged pax header", after));
      }
    } else {
      if (type == '0' || type == '\0' || type == '7') entries.push_back({name, data, size});
      next = Override();
    }
    offset = data;
    if (has_content) offset += (size + kBlock - 1) / kBlock * kBlock;
    if (offset > archive.size()) {
      // The content is there but not its padding.
      return error(archive.size(), absl::StrCat("truncated after entry ", name));
    }
  }
}

}  // namespace codistill
