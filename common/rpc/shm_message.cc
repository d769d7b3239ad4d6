#include "common/rpc/shm_message.h"

#include <algorithm>
#include <cstring>

#include "common/base/streaming_copy.h"

namespace codistill {
namespace {

constexpr size_t kCacheLine = 64;
// Slices from this size on are payload, and worth an aligned place; smaller frames are copied out
// of their slots at once.
constexpr size_t kLargeBytes = 4096;

struct Held {
  std::shared_ptr<ShmLink> link;
  uint32_t slot;
};

}  // namespace

void ShmMessageWriter::Start(const grpc::ByteBuffer& message) {
  slices_.clear();
  if (!message.Dump(&slices_).ok()) slices_.clear();
  last_kind_ = ShmLink::Kind::kMessageEnd;
  Begin();
}

void ShmMessageWriter::Start(ShmLink::Kind kind, const std::string& bytes) {
  slices_.clear();
  slices_.emplace_back(bytes.substr(0, link_->geometry().slot_bytes));
  last_kind_ = kind;
  Begin();
}

void ShmMessageWriter::Begin() {
  slice_ = 0;
  at_ = 0;
  left_ = 0;
  offset_ = 0;
  size_t before = 0;
  bool large = false;
  for (const grpc::Slice& slice : slices_) {
    large = large || slice.size() >= kLargeBytes;
    if (!large) before += slice.size();
    left_ += slice.size();
  }
  if (large) offset_ = static_cast<uint32_t>((kCacheLine - before % kCacheLine) % kCacheLine);
  started_ = true;
}

bool ShmMessageWriter::Pump() {
  ShmLink::Slot slot;
  while (started_) {
    if (!link_->Acquire(&slot)) return false;
    const size_t room = link_->geometry().slot_bytes - offset_;
    const size_t bytes = std::min(left_, room);
    uint8_t* to = slot.data + offset_;
    for (size_t todo = bytes; todo > 0;) {
      const grpc::Slice& slice = slices_[slice_];
      const size_t n = std::min(todo, slice.size() - at_);
      if (n > 0) PrefetchingCopy(to, slice.begin() + at_, n);
      to += n;
      todo -= n;
      at_ += n;
      if (at_ == slice.size()) {
        ++slice_;
        at_ = 0;
      }
    }
    left_ -= bytes;
    link_->Send(slot, left_ > 0 ? ShmLink::Kind::kMessage : last_kind_, offset_,
                static_cast<uint32_t>(bytes));
    offset_ = 0;
    if (left_ > 0) continue;
    started_ = false;
    slices_.clear();  // lets go of what was sent
  }
  return true;
}

ShmMessageReader::Result ShmMessageReader::Add(const ShmLink::Frame& frame) {
  bytes_ += frame.bytes;
  const bool too_long = bytes_ > max_bytes_;
  // Enough slots remain for the sender, whatever is kept by whoever was given a message.
  const bool keep = frame.bytes >= kLargeBytes && link_->held() <= link_->geometry().slots / 2 + 1;
  if (too_long || !keep) {
    if (!too_long && frame.bytes > 0) slices_.emplace_back(frame.data, frame.bytes);
    link_->Release(frame.slot);
  } else {
    slices_.emplace_back(
        const_cast<uint8_t*>(frame.data), frame.bytes,
        [](void* user_data) {
          const std::unique_ptr<Held> held(static_cast<Held*>(user_data));
          held->link->Release(held->slot);
        },
        new Held{link_, frame.slot});
  }
  if (too_long) return Result::kTooLong;
  return frame.kind == ShmLink::Kind::kMessageEnd ? Result::kComplete : Result::kMore;
}

grpc::ByteBuffer ShmMessageReader::Message() {
  if (slices_.empty()) slices_.emplace_back();
  grpc::ByteBuffer message(slices_.data(), slices_.size());
  Clear();
  return message;
}

void ShmMessageReader::Clear() {
  slices_.clear();
  bytes_ = 0;
}

}  // namespace codistill
