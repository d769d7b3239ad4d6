#include "common/rpc/frame.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/streaming_copy.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"

namespace codistill {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;

constexpr int kMaxVarintBytes = 10;
// Below this a copy is cheaper than a slice with an owner.
constexpr size_t kCopyBelowBytes = 512;
// From here on a copy is of a tensor that does not fit the caches with all the others.
constexpr size_t kStreamFromBytes = 256 << 10;

grpc::Slice SliceOf(const std::string& bytes) { return grpc::Slice(bytes.data(), bytes.size()); }

grpc::Slice SliceOf(const PayloadRef& payload) {
  auto* owner = new std::shared_ptr<const void>(payload.owner);
  return grpc::Slice(
      const_cast<void*>(payload.data), payload.size,
      [](void* user_data) { delete static_cast<std::shared_ptr<const void>*>(user_data); }, owner);
}

// A message on its way out, as a list of slices.
class MessageWriter {
 public:
  explicit MessageWriter(const google::protobuf::MessageLite& small)
      : pending_(small.SerializeAsString()) {}

  void BeginField(int field, size_t size) {
    uint8_t header[2 * kMaxVarintBytes];
    uint8_t* end = CodedOutputStream::WriteTagToArray(
        WireFormatLite::MakeTag(field, WireFormatLite::WIRETYPE_LENGTH_DELIMITED), header);
    end = CodedOutputStream::WriteVarint64ToArray(size, end);
    pending_.append(reinterpret_cast<const char*>(header), end - header);
  }

  void Append(const PayloadRef& payload) {
    if (payload.size < kCopyBelowBytes) {
      if (payload.size > 0) {
        pending_.append(static_cast<const char*>(payload.data), payload.size);
      }
      return;
    }
    if (!pending_.empty()) slices_.push_back(SliceOf(pending_));
    pending_.clear();
    slices_.push_back(SliceOf(payload));
  }

  grpc::ByteBuffer Take() {
    // A message without bytes is one empty slice: a ByteBuffer without any is not valid.
    if (!pending_.empty() || slices_.empty()) slices_.push_back(SliceOf(pending_));
    return grpc::ByteBuffer(slices_.data(), slices_.size());
  }

 private:
  std::vector<grpc::Slice> slices_;
  std::string pending_;  // bytes of ours that wait for the next slice of somebody else's
};

// Reads protobuf's wire format off a list of slices. Every method returns false at the end of the
// bytes; nothing is consumed that is not there.
class SliceReader {
 public:
  explicit SliceReader(const std::vector<grpc::Slice>& slices) : slices_(slices) {
    for (const grpc::Slice& slice : slices_) left_ += slice.size();
  }

  bool AtEnd() const { return left_ == 0; }
  size_t left() const { return left_; }

  // A varint, also appended to `raw` as it is.
  bool ReadVarint(uint64_t* value, std::string* raw) {
    *value = 0;
    for (int i = 0; i < kMaxVarintBytes; ++i) {
      if (left_ == 0) return false;
      const uint8_t byte = *NextPart(1).data();
      raw->push_back(static_cast<char>(byte));
      *value |= static_cast<uint64_t>(byte & 0x7f) << (7 * i);
      if ((byte & 0x80) == 0) return true;
    }
    return false;
  }

  bool Append(size_t size, std::string* to) {
    if (size > left_) return false;
    while (size > 0) {
      const absl::Span<const uint8_t> part = NextPart(size);
      to->append(reinterpret_cast<const char*>(part.data()), part.size());
      size -= part.size();
    }
    return true;
  }

  bool Take(size_t size, std::vector<absl::Span<const uint8_t>>* parts) {
    if (size > left_) return false;
    while (size > 0) {
      parts->push_back(NextPart(size));
      size -= parts->back().size();
    }
    return true;
  }

 private:
  // At most `size` bytes that lie together, at least one. There must be one.
  absl::Span<const uint8_t> NextPart(size_t size) {
    while (offset_ == slices_[index_].size()) {
      ++index_;
      offset_ = 0;
    }
    const grpc::Slice& slice = slices_[index_];
    const absl::Span<const uint8_t> part(slice.begin() + offset_,
                                         std::min(size, slice.size() - offset_));
    offset_ += part.size();
    left_ -= part.size();
    return part;
  }

  const std::vector<grpc::Slice>& slices_;
  size_t index_ = 0;
  size_t offset_ = 0;
  size_t left_ = 0;
};

absl::Status Malformed(absl::string_view what, size_t total, size_t left) {
  return absl::InvalidArgumentError(absl::StrCat("malformed message of ", total, " bytes: ", what,
                                                 " before byte ", total - left));
}

}  // namespace

grpc::ByteBuffer EncodeWithPayload(const google::protobuf::MessageLite& small, int payload_field,
                                   absl::Span<const PayloadRef> payloads) {
  MessageWriter writer(small);
  for (const PayloadRef& payload : payloads) {
    writer.BeginField(payload_field, payload.size);
    writer.Append(payload);
  }
  return writer.Take();
}

grpc::ByteBuffer EncodeWithParts(const google::protobuf::MessageLite& small, int payload_field,
                                 absl::Span<const PayloadRef> parts) {
  MessageWriter writer(small);
  size_t size = 0;
  for (const PayloadRef& part : parts) size += part.size;
  writer.BeginField(payload_field, size);
  for (const PayloadRef& part : parts) writer.Append(part);
  return writer.Take();
}

absl::Status DecodedPayload::Decode(grpc::ByteBuffer* buffer, int payload_field,
                                    google::protobuf::MessageLite* small, DecodedPayload* out) {
  DecodedPayload decoded;
  if (!buffer->Valid() || !buffer->Dump(&decoded.slices_).ok()) {
    return absl::InvalidArgumentError("message without bytes, or badly compressed");
  }
  // From here on the slices stay where they are: parts point into them.
  SliceReader reader(decoded.slices_);
  const size_t total = reader.left();
  std::string fields;  // all but the payloads, as they are
  while (!reader.AtEnd()) {
    const size_t start = fields.size();
    uint64_t tag = 0, value = 0;
    if (!reader.ReadVarint(&tag, &fields) || tag > 0xffffffffu || (tag >> 3) == 0) {
      return Malformed("no field tag", total, reader.left());
    }
    const int field = static_cast<int>(tag >> 3);
    const auto type = static_cast<WireFormatLite::WireType>(tag & 7);
    if (field == payload_field && type != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      return Malformed(absl::StrCat("field ", field, " is not bytes"), total, reader.left());
    }
    bool complete = false;
    switch (type) {
      case WireFormatLite::WIRETYPE_VARINT:
        complete = reader.ReadVarint(&value, &fields);
        break;
      case WireFormatLite::WIRETYPE_FIXED64:
        complete = reader.Append(8, &fields);
        break;
      case WireFormatLite::WIRETYPE_FIXED32:
        complete = reader.Append(4, &fields);
        break;
      case WireFormatLite::WIRETYPE_LENGTH_DELIMITED:
        if (!reader.ReadVarint(&value, &fields)) break;
        if (field != payload_field) {
          complete = reader.Append(value, &fields);
        } else {
          fields.resize(start);
          Payload payload;
          payload.size = value;
          complete = reader.Take(value, &payload.parts);
          decoded.payloads_.push_back(std::move(payload));
        }
        break;
      default:
        return Malformed(absl::StrCat("field ", field, " has wire type ", static_cast<int>(type)),
                         total, reader.left());
    }
    if (!complete) {
      return Malformed(absl::StrCat("field ", field, " is cut short"), total, reader.left());
    }
  }
  if (!small->ParseFromString(fields)) {
    return absl::InvalidArgumentError(
        absl::StrCat("message of ", total, " bytes is no ", small->GetTypeName()));
  }
  *out = std::move(decoded);
  return absl::OkStatus();
}

void DecodedPayload::CopyTo(int i, void* to) const { CopyRangeTo(i, 0, size(i), to); }

void DecodedPayload::CopyRangeTo(int i, size_t begin, size_t size, void* to) const {
  const bool large = size >= kStreamFromBytes;
  auto* next = static_cast<uint8_t*>(to);
  for (absl::Span<const uint8_t> part : parts(i)) {
    if (size == 0) return;
    if (begin >= part.size()) {
      begin -= part.size();
      continue;
    }
    part = part.subspan(begin, size);
    begin = 0;
    if (large) {
      StreamingCopy(next, part.data(), part.size());
    } else {
      std::memcpy(next, part.data(), part.size());
    }
    next += part.size();
    size -= part.size();
  }
}

absl::Span<const uint8_t> DecodedPayload::View(int i, size_t begin, size_t size) const {
  for (const absl::Span<const uint8_t> part : parts(i)) {
    if (begin < part.size()) return part.subspan(begin, size);
    begin -= part.size();
  }
  return {};
}

}  // namespace codistill
