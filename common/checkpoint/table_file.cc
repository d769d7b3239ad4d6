#include "common/checkpoint/table_file.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/crc32c.h"
#include "common/base/status.h"

namespace codistill {
namespace {

constexpr absl::string_view kMagic = "CDTABLE\x01";
constexpr uint64_t kRecordPrefix = 8;  // length and checksum
constexpr uint64_t kMaxRecordBytes = 256 << 20;

void AppendFixed32(uint32_t value, std::string* bytes) {
  for (int i = 0; i < 4; ++i) bytes->push_back(static_cast<char>(value >> (8 * i)));
}

uint32_t ParseFixed32(const char* bytes) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value |= uint32_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  return value;
}

absl::Status Damaged(const std::string& path, absl::string_view what) {
  return absl::DataLossError(absl::StrCat(path, ": ", what));
}

}  // namespace

std::string TableFileName(int shard, int num_shards, const Version& version, uint32_t attempt) {
  return absl::StrCat("tables-", shard, "-of-", num_shards, "-", version.generation(), "-",
                      version.step(), "-", attempt);
}

absl::StatusOr<std::unique_ptr<TableFileWriter>> TableFileWriter::Create(
    const std::string& directory, const std::string& name, TableFileHeader header,
    FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<FileWriter> writer,
                             FileWriter::Create(JoinPath(directory, name), file_system));
  std::unique_ptr<TableFileWriter> file(new TableFileWriter(name, std::move(writer)));
  header.set_format_version(1);
  CODISTILL_RETURN_IF_ERROR(file->writer_->Append(kMagic));
  CODISTILL_RETURN_IF_ERROR(file->Record(header.SerializeAsString()));
  return file;
}

absl::Status TableFileWriter::Record(const std::string& bytes) {
  if (bytes.size() > kMaxRecordBytes) {
    return absl::InternalError(
        absl::StrCat(writer_->path(), ": a record of ", bytes.size(), " bytes cannot be written"));
  }
  std::string prefix;
  AppendFixed32(static_cast<uint32_t>(bytes.size()), &prefix);
  AppendFixed32(Crc32c(bytes), &prefix);
  CODISTILL_RETURN_IF_ERROR(writer_->Append(prefix));
  CODISTILL_RETURN_IF_ERROR(writer_->Append(bytes));
  ++records_;
  return absl::OkStatus();
}

absl::Status TableFileWriter::Append(const TableRows& rows) {
  return Record(rows.SerializeAsString());
}

absl::StatusOr<CheckpointFile> TableFileWriter::Finish() {
  TableRows last;
  last.set_records(records_);
  CODISTILL_RETURN_IF_ERROR(Record(last.SerializeAsString()));
  CODISTILL_RETURN_IF_ERROR(writer_->SyncAndClose());
  CheckpointFile file;
  file.set_name(name_);
  file.set_bytes(writer_->bytes());
  file.set_crc32c(writer_->crc32c());
  return file;
}

absl::StatusOr<std::unique_ptr<TableFileReader>> TableFileReader::Open(const std::string& path,
                                                                       FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  std::unique_ptr<TableFileReader> reader(new TableFileReader(std::move(file)));
  char magic[8];
  if (reader->file_->size() < sizeof(magic)) return Damaged(path, "is cut short in its magic");
  CODISTILL_RETURN_IF_ERROR(reader->file_->ReadAt(0, sizeof(magic), magic));
  if (absl::string_view(magic, sizeof(magic)) != kMagic) {
    return Damaged(path, "bytes 0 to 7 are not those of a file of embedding tables");
  }
  reader->at_ = sizeof(magic);
  CODISTILL_ASSIGN_OR_RETURN(const std::string header, reader->Record());
  if (!reader->header_.ParseFromString(header)) return Damaged(path, "the header is no message");
  if (reader->header_.format_version() != 1) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": format version ",
                                                      reader->header_.format_version(),
                                                      "; this program reads version 1"));
  }
  return reader;
}

absl::StatusOr<std::string> TableFileReader::Record() {
  const std::string& path = file_->path();
  char prefix[kRecordPrefix];
  if (file_->size() - at_ < kRecordPrefix) {
    return Damaged(path, absl::StrCat("is cut short at byte ", file_->size()));
  }
  CODISTILL_RETURN_IF_ERROR(file_->ReadAt(at_, kRecordPrefix, prefix));
  const uint64_t length = ParseFixed32(prefix);
  if (length > kMaxRecordBytes || file_->size() - at_ - kRecordPrefix < length) {
    return Damaged(path, absl::StrCat("the record at byte ", at_, " has ", length,
                                      " bytes; the file ends at ", file_->size()));
  }
  std::string bytes(length, '\0');
  CODISTILL_RETURN_IF_ERROR(file_->ReadAt(at_ + kRecordPrefix, length, &bytes[0]));
  if (Crc32c(bytes) != ParseFixed32(prefix + 4)) {
    return Damaged(path, absl::StrCat("the record at byte ", at_, " is damaged"));
  }
  at_ += kRecordPrefix + length;
  ++records_;
  return bytes;
}

absl::StatusOr<bool> TableFileReader::Next(TableRows* rows) {
  const std::string& path = file_->path();
  const uint64_t at = at_;
  CODISTILL_ASSIGN_OR_RETURN(const std::string bytes, Record());
  if (!rows->ParseFromString(bytes)) {
    return Damaged(path, absl::StrCat("the record at byte ", at, " is no message"));
  }
  if (rows->records() == 0) return true;
  if (rows->records() != records_ - 1 || at_ != file_->size()) {
    return Damaged(path, absl::StrCat("the last record, at byte ", at, ", counts ", rows->records(),
                                      " records where ", records_ - 1, " are; the file ends at ",
                                      file_->size()));
  }
  return false;
}

}  // namespace codistill
