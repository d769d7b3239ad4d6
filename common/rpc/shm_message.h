#ifndef CODISTILL_COMMON_RPC_SHM_MESSAGE_H_
#define CODISTILL_COMMON_RPC_SHM_MESSAGE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/rpc/shm_link.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"

// Messages on a ShmLink: the bytes of a gRPC message, cut into frames.
namespace codistill {

// Sends one message after the other, each copied once. The first large slice of a message, its
// payload, begins at a cache line: copies from and to odd addresses are slower.
class ShmMessageWriter {
 public:
  explicit ShmMessageWriter(ShmLink* link) : link_(link) {}

  // Only when the last message was pumped out. Frames of `kind` (kMessage stands for the pair).
  void Start(const grpc::ByteBuffer& message);
  void Start(ShmLink::Kind kind, const std::string& bytes);
  bool started() const { return started_; }
  // Goes on until the message is out (true) or no slot is free (false).
  bool Pump();

 private:
  void Begin();

  ShmLink* const link_;
  ShmLink::Kind last_kind_ = ShmLink::Kind::kMessageEnd;
  std::vector<grpc::Slice> slices_;
  size_t slice_ = 0;
  size_t at_ = 0;    // in slices_[slice_]
  size_t left_ = 0;  // bytes of the message
  uint32_t offset_ = 0;
  bool started_ = false;
};

// Puts messages together. Their bytes stay in the slots, which go back when the message is
// destroyed; where so many messages are kept that the sender would run out of slots, in memory of
// their own.
class ShmMessageReader {
 public:
  ShmMessageReader(std::shared_ptr<ShmLink> link, size_t max_bytes)
      : link_(std::move(link)), max_bytes_(max_bytes) {}

  enum class Result { kMore, kComplete, kTooLong };
  // Takes over a frame of kind kMessage or kMessageEnd.
  Result Add(const ShmLink::Frame& frame);
  // After kComplete.
  grpc::ByteBuffer Message();
  size_t bytes() const { return bytes_; }
  // Forgets what has come of an unfinished message.
  void Clear();

 private:
  const std::shared_ptr<ShmLink> link_;
  const size_t max_bytes_;
  std::vector<grpc::Slice> slices_;
  size_t bytes_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_SHM_MESSAGE_H_
