#include "common/checkpoint/safetensors.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/base/status.h"
#include "common/tensor/tensor.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

struct TypeName {
  absl::string_view name;
  DataType dtype;
};
constexpr TypeName kTypeNames[] = {
    {"F32", DT_FLOAT},     {"F64", DT_DOUBLE}, {"F16", DT_HALF},
    {"BF16", DT_BFLOAT16}, {"I32", DT_INT32},  {"I64", DT_INT64},
    {"U8", DT_UINT8},      {"BOOL", DT_BOOL},  {"I8", DT_INT8},
};

// One tensor's entry of the header; `data_bytes` is the length of the data area. Returns what is
// wrong, empty if nothing.
std::string ParseEntry(const Json& json, uint64_t data_bytes, SafetensorsReader::Entry* entry) {
  if (!json.is_object()) return "its header entry is no object";
  const auto dtype = json.find("dtype");
  if (dtype == json.end() || !dtype->is_string()) return "has no dtype";
  const auto& type_name = dtype->get_ref<const std::string&>();
  for (const TypeName& known : kTypeNames) {
    if (known.name == type_name) entry->dtype = known.dtype;
  }
  if (entry->dtype == DT_INVALID)
    return absl::StrCat("has dtype ", type_name, ", which is not known");

  const auto shape = json.find("shape");
  if (shape == json.end() || !shape->is_array()) return "has no shape";
  for (const Json& dimension : *shape) {
    if (!dimension.is_number_unsigned() || dimension.get<uint64_t>() > (uint64_t{1} << 62)) {
      return "has a shape that is not made of non-negative integers";
    }
    entry->shape.push_back(static_cast<int64_t>(dimension.get<uint64_t>()));
  }
  const int64_t elements = ElementCount(entry->shape);
  if (elements < 0)
    return absl::StrCat("has shape ", ShapeString(entry->shape), ", which is too large");

  const auto offsets = json.find("data_offsets");
  if (offsets == json.end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return "has no data_offsets [begin, end]";
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data_bytes) {
    return absl::StrCat("lies in bytes ", begin, " to ", end, " of the data, which has ",
                        data_bytes, " bytes: is the file cut short?");
  }
  const uint64_t size = ElementSize(entry->dtype);
  if ((end - begin) % size != 0 || (end - begin) / size != static_cast<uint64_t>(elements)) {
    return absl::StrCat("has ", end - begin, " bytes; ", type_name, ShapeString(entry->shape),
                        " needs ", elements, " elements of ", size, " bytes");
  }
  entry->begin = begin;
  entry->bytes = end - begin;
  return "";
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::Open(
    const std::string& path, FileSystem* file_system) {
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<ReadableFile> file, file_system->OpenForRead(path));
  std::unique_ptr<SafetensorsReader> reader(new SafetensorsReader(std::move(file)));
  CODISTILL_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

absl::Status SafetensorsReader::ReadHeader() {
  const auto damaged = [this](absl::string_view what) {
    return absl::DataLossError(absl::StrCat(path(), ": ", what));
  };
  const uint64_t size = file_->size();
  if (size < kLengthBytes) return damaged(absl::StrCat("is no safetensors file: ", size, " bytes"));
  char length_bytes[kLengthBytes];
  CODISTILL_RETURN_IF_ERROR(file_->ReadAt(0, kLengthBytes, length_bytes));
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= uint64_t{static_cast<uint8_t>(length_bytes[i])} << (8 * i);
  }
  if (header_bytes > kMaxHeaderBytes || header_bytes > size - kLengthBytes) {
    return damaged(
        absl::StrCat("is no safetensors file, or cut short: its first 8 bytes give a header of ",
                     header_bytes, " bytes, the file has ", size));
  }
  std::string text(header_bytes, '\0');
  CODISTILL_RETURN_IF_ERROR(file_->ReadAt(kLengthBytes, header_bytes, &text[0]));
  const Json header = Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object()) {
    return damaged("its header is no JSON object");
  }
  const uint64_t data_begin = kLengthBytes + header_bytes;
  uint64_t end = 0;
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") continue;
    Entry entry;
    const std::string wrong = ParseEntry(item.value(), size - data_begin, &entry);
    if (!wrong.empty()) return damaged(absl::StrCat("tensor ", item.key(), " ", wrong));
    end = std::max(end, entry.begin + entry.bytes);
    entry.begin += data_begin;
    entries_.emplace(item.key(), std::move(entry));
  }
  if (end != size - data_begin) {
    return damaged(absl::StrCat("has ", size - data_begin - end,
                                " bytes after the last tensor, which belong to none"));
  }
  return absl::OkStatus();
}

const SafetensorsReader::Entry* SafetensorsReader::Find(const std::string& name) const {
  const auto it = entries_.find(name);
  return it == entries_.end() ? nullptr : &it->second;
}

absl::Status SafetensorsReader::Read(const std::string& name, uint64_t offset, size_t n,
                                     void* to) const {
  const Entry* const entry = Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat(path(), ": has no tensor ", name));
  }
  if (offset > entry->bytes || n > entry->bytes - offset) {
    return absl::OutOfRangeError(absl::StrCat(path(), ": tensor ", name, " has ", entry->bytes,
                                              " bytes; ", n, " from byte ", offset,
                                              " were asked for"));
  }
  return Annotate(file_->ReadAt(entry->begin + offset, n, static_cast<char*>(to)),
                  absl::StrCat("tensor ", name));
}

absl::Status WriteSafetensors(const std::string& path, const std::vector<SafetensorsItem>& items,
                              const std::map<std::string, std::string>& metadata,
                              FileSystem* file_system) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t end = 0;
  std::vector<uint64_t> sizes;
  for (const SafetensorsItem& item : items) {
    absl::string_view type;
    for (const TypeName& known : kTypeNames) {
      if (known.dtype == item.dtype) type = known.name;
    }
    if (type.empty() || header.contains(item.name)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor ", item.name,
                       type.empty() ? absl::StrCat(" is ", DataTypeName(item.dtype),
                                                   ", which safetensors files cannot hold")
                                    : " is there twice"));
    }
    sizes.push_back(static_cast<uint64_t>(ElementCount(item.shape)) * ElementSize(item.dtype));
    header[item.name] = {{"dtype", std::string(type)},
                         {"shape", item.shape},
                         {"data_offsets", {end, end + sizes.back()}}};
    end += sizes.back();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data begins aligned
  std::string length;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    length.push_back(static_cast<char>(text.size() >> (8 * i)));
  }
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<FileWriter> writer,
                             FileWriter::Create(path, file_system));
  CODISTILL_RETURN_IF_ERROR(writer->Append(length));
  CODISTILL_RETURN_IF_ERROR(writer->Append(text));
  std::string bytes;
  for (size_t i = 0; i < items.size(); ++i) {
    bytes.resize(sizes[i]);
    CODISTILL_RETURN_IF_ERROR(Annotate(items[i].read(bytes.data()), items[i].name));
    CODISTILL_RETURN_IF_ERROR(writer->Append(bytes));
  }
  return writer->SyncAndClose();
}

}  // namespace codistill
