#include "common/checkpoint/shard_file.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/crc32c.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr absl::string_view kMagic = "CDSHARD\x01";
constexpr uint64_t kPrefixBytes = 16;  // magic, header length, header checksum
constexpr uint64_t kMaxHeaderBytes = 256 << 20;
constexpr uint64_t kAlignment = 64;
constexpr size_t kBlockBytes = 1 << 20;

uint64_t Align(uint64_t value) { return (value + kAlignment - 1) / kAlignment * kAlignment; }

std::string Fixed32(uint32_t value) {
  std::string bytes(4, '\0');
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

uint32_t ParseFixed32(const char* bytes) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value |= uint32_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  return value;
}

absl::string_view Zeros(size_t n) {
  static constexpr char kZeros[kAlignment] = {};
  return absl::string_view(kZeros, n);
}

// Damage in a file is one code, whatever showed it.
absl::Status Damaged(const std::string& path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what));
}

// A file that ends too early is a damaged one.
absl::Status ReadExactly(const ReadableFile& file, uint64_t offset, size_t n, char* to) {
  const absl::Status status = file.ReadAt(offset, n, to);
  if (absl::IsOutOfRange(status)) return absl::DataLossError(status.message());
  return status;
}

// Where the item's bytes are.
std::vector<absl::string_view> PartsOf(const ShardFileData& item) {
  if (!item.parts.empty()) return item.parts;
  return {{static_cast<const char*>(item.data), static_cast<size_t>(item.bytes)}};
}

}  // namespace

std::string ShardFileName(int shard, int num_shards, const Version& version, uint32_t attempt) {
  return absl::StrCat("shard-", shard, "-of-", num_shards, "-", version.generation(), "-",
                      version.step(), "-", attempt);
}

absl::StatusOr<CheckpointFile> WriteShardFile(const std::string& directory, const std::string& name,
                                              CheckpointShardHeader identity,
                                              absl::Span<const ShardFileData> data,
                                              FileSystem* file_system) {
  identity.set_format_version(1);
  identity.clear_entries();
  uint64_t offset = 0;
  std::vector<uint32_t> sums;  // of all parts, for the checksum of the whole file
  for (const ShardFileData& item : data) {
    CheckpointEntry* const entry = identity.add_entries();
    *entry = item.entry;
    entry->set_offset(offset);
    entry->set_bytes(item.bytes);
    uint32_t crc = 0;
    for (absl::string_view part : PartsOf(item)) {
      sums.push_back(Crc32c(part));
      crc = Crc32cConcat(crc, sums.back(), part.size());
    }
    entry->set_crc32c(crc);
    offset = Align(offset + item.bytes);
  }
  std::string header;
  if (!identity.SerializeToString(&header) || header.size() > kMaxHeaderBytes) {
    return absl::InternalError(absl::StrCat(JoinPath(directory, name), ": header of ",
                                            header.size(), " bytes cannot be written"));
  }

  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<FileWriter> writer,
                             FileWriter::Create(JoinPath(directory, name), file_system));
  CODISTILL_RETURN_IF_ERROR(writer->Append(kMagic));
  CODISTILL_RETURN_IF_ERROR(writer->Append(Fixed32(static_cast<uint32_t>(header.size()))));
  CODISTILL_RETURN_IF_ERROR(writer->Append(Fixed32(Crc32c(header))));
  CODISTILL_RETURN_IF_ERROR(writer->Append(header));
  auto sum = sums.begin();
  for (const ShardFileData& item : data) {
    CODISTILL_RETURN_IF_ERROR(writer->Append(Zeros(Align(writer->bytes()) - writer->bytes())));
    for (absl::string_view part : PartsOf(item)) {
      CODISTILL_RETURN_IF_ERROR(writer->AppendSummed(part, *sum++));
    }
  }
  CODISTILL_RETURN_IF_ERROR(writer->Append(Zeros(Align(writer->bytes()) - writer->bytes())));
  CODISTILL_RETURN_IF_ERROR(writer->SyncAndClose());

  CheckpointFile file;
  file.set_name(name);
  file.set_bytes(writer->bytes());
  file.set_crc32c(writer->crc32c());
  return file;
}

absl::StatusOr<std::unique_ptr<ShardFileReader>> ShardFileReader::Open(const std::string& path,
                                                                       FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  std::unique_ptr<ShardFileReader> reader(new ShardFileReader(std::move(file)));
  CODISTILL_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

absl::Status ShardFileReader::ReadHeader() {
  const std::string& path = file_->path();
  if (file_->size() < kPrefixBytes) {
    return Damaged(path, absl::StrCat("is cut short: ", file_->size(),
                                      " bytes, the prefix alone has ", kPrefixBytes));
  }
  char prefix[kPrefixBytes];
  CODISTILL_RETURN_IF_ERROR(ReadExactly(*file_, 0, kPrefixBytes, prefix));
  if (absl::string_view(prefix, kMagic.size()) != kMagic) {
    return Damaged(path, "bytes 0 to 7 are not those of a shard file");
  }
  const uint64_t header_bytes = ParseFixed32(prefix + 8);
  if (header_bytes > kMaxHeaderBytes || kPrefixBytes + header_bytes > file_->size()) {
    return Damaged(path, absl::StrCat("bytes 8 to 11 give a header of ", header_bytes,
                                      " bytes; the file has ", file_->size()));
  }
  std::string header(header_bytes, '\0');
  CODISTILL_RETURN_IF_ERROR(ReadExactly(*file_, kPrefixBytes, header_bytes, &header[0]));
  header_end_ = kPrefixBytes + header_bytes;
  data_begin_ = Align(header_end_);
  if (Crc32c(header) != ParseFixed32(prefix + 12)) {
    return Damaged(path, absl::StrCat("the header (bytes ", kPrefixBytes, " to ", header_end_ - 1,
                                      ") or its checksum (bytes 12 to 15) is damaged"));
  }
  if (!header_.ParseFromString(header)) {
    return Damaged(path, "the header is no message CheckpointShardHeader");
  }
  if (header_.format_version() != 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        path, ": format version ", header_.format_version(), "; this program reads version 1"));
  }
  uint64_t expected = 0;  // in the data area
  for (int i = 0; i < header_.entries_size(); ++i) {
    const CheckpointEntry& entry = header_.entries(i);
    if (entry.offset() != expected || entry.bytes() > file_->size()) {
      return Damaged(path, absl::StrCat("the header places ", EntryName(i), " at offset ",
                                        entry.offset(), " with ", entry.bytes(), " bytes; offset ",
                                        expected, " was expected"));
    }
    expected = Align(expected + entry.bytes());
  }
  if (data_begin_ + expected != file_->size()) {
    return Damaged(path, absl::StrCat("has ", file_->size(), " bytes; its header implies ",
                                      data_begin_ + expected));
  }
  return CheckPadding(header_end_, data_begin_);
}

absl::Status ShardFileReader::Read(int index, void* to) const {
  const absl::Span<char> whole(static_cast<char*>(to), header_.entries(index).bytes());
  return ReadParts(index, absl::MakeConstSpan(&whole, 1));
}

absl::Status ShardFileReader::ReadParts(int index, absl::Span<const absl::Span<char>> parts) const {
  const CheckpointEntry& entry = header_.entries(index);
  const uint64_t begin = data_begin_ + entry.offset();
  const uint64_t end = begin + entry.bytes();
  uint32_t crc = 0;
  uint64_t at = begin;
  for (const absl::Span<char>& part : parts) {
    if (part.size() > end - at) {
      return absl::InternalError(absl::StrCat(file_->path(), ": ", EntryName(index), " has ",
                                              entry.bytes(), " bytes; more were asked for"));
    }
    CODISTILL_RETURN_IF_ERROR(ReadExactly(*file_, at, part.size(), part.data()));
    crc = Crc32cExtend(crc, {part.data(), part.size()});
    at += part.size();
  }
  if (at != end) {
    return absl::InternalError(absl::StrCat(file_->path(), ": ", EntryName(index), " has ",
                                            entry.bytes(), " bytes; only ", at - begin,
                                            " were asked for"));
  }
  if (crc != entry.crc32c()) {
    return Damaged(file_->path(), absl::StrCat("the data of ", EntryName(index), " (bytes ", begin,
                                               " to ", end - 1, ") is damaged"));
  }
  return CheckPadding(end, Align(end));
}

absl::Status ShardFileReader::VerifyAll() const {
  std::vector<char> buffer;
  for (int i = 0; i < header_.entries_size(); ++i) {
    buffer.resize(std::max<uint64_t>(buffer.size(), header_.entries(i).bytes()));
    CODISTILL_RETURN_IF_ERROR(Read(i, buffer.data()));
  }
  return absl::OkStatus();
}

absl::Status ShardFileReader::CheckPadding(uint64_t begin, uint64_t end) const {
  char padding[kAlignment];
  CODISTILL_RETURN_IF_ERROR(ReadExactly(*file_, begin, end - begin, padding));
  if (absl::string_view(padding, end - begin) != Zeros(end - begin)) {
    return Damaged(file_->path(),
                   absl::StrCat("the padding in bytes ", begin, " to ", end - 1, " is not zero"));
  }
  return absl::OkStatus();
}

std::string ShardFileReader::EntryName(int index) const {
  const CheckpointEntry& entry = header_.entries(index);
  return absl::StrCat("entry ", index, " (tensor ", entry.piece().tensor(), ", elements from ",
                      entry.piece().begin(), entry.slot().empty() ? "" : ", slot ", entry.slot(),
                      ")");
}

absl::Status VerifyCheckpointFile(const std::string& directory, const CheckpointFile& expected,
                                  FileSystem* file_system) {
  const std::string path = JoinPath(directory, expected.name());
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  if (file->size() != expected.bytes()) {
    return Damaged(
        path, absl::StrCat("has ", file->size(), " bytes; the manifest says ", expected.bytes()));
  }
  std::vector<char> block(std::min<uint64_t>(kBlockBytes, file->size()));
  uint32_t crc = 0;
  for (uint64_t offset = 0; offset < file->size();) {
    const size_t n = std::min<uint64_t>(block.size(), file->size() - offset);
    CODISTILL_RETURN_IF_ERROR(ReadExactly(*file, offset, n, block.data()));
    crc = Crc32cExtend(crc, {block.data(), n});
    offset += n;
  }
  if (crc != expected.crc32c()) {
    // The reader knows the place.
    absl::StatusOr<std::unique_ptr<ShardFileReader>> reader =
        ShardFileReader::Open(path, file_system);
    if (!reader.ok()) return reader.status();
    CODISTILL_RETURN_IF_ERROR((*reader)->VerifyAll());
    return Damaged(path, "is not the file the manifest names: its checksum differs");
  }
  return absl::OkStatus();
}

}  // namespace codistill
