#include "tests/benchmarks/raw_grpc.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

constexpr size_t kFrameBytes = 1 << 20;
constexpr int kMaxMessageBytes = 2 << 20;
constexpr char kPush[] = "/raw/push";
constexpr char kPull[] = "/raw/pull";

// Nothing frees the memory: the array outlives all calls.
grpc::ByteBuffer FrameOf(const char* data, size_t size) {
  const grpc::Slice slice(
      const_cast<char*>(data), size, [](void*) {}, nullptr);
  return grpc::ByteBuffer(&slice, 1);
}

grpc::ByteBuffer Small(const std::string& text) {
  const grpc::Slice slice(text);
  return grpc::ByteBuffer(&slice, 1);
}

// Copies a frame to `to`, of which `left` bytes are left. False: it does not fit.
bool CopyFrame(const grpc::ByteBuffer& frame, char** to, size_t* left) {
  std::vector<grpc::Slice> slices;
  if (!frame.Dump(&slices).ok()) return false;
  for (const grpc::Slice& slice : slices) {
    if (slice.size() > *left) return false;
    std::memcpy(*to, slice.begin(), slice.size());
    *to += slice.size();
    *left -= slice.size();
  }
  return true;
}

// One operation at a time: true if it succeeded.
bool Wait(grpc::CompletionQueue* queue) {
  void* tag = nullptr;
  bool ok = false;
  return queue->Next(&tag, &ok) && ok;
}

class RawGrpcClientImpl final : public RawGrpcClient {
 public:
  explicit RawGrpcClientImpl(const std::string& address) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
    arguments.SetMaxSendMessageSize(kMaxMessageBytes);
    channel_ = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }

  absl::Status Push(absl::Span<const float> from) override {
    return Call(kPush, [&](Stream* stream) {
      const char* data = reinterpret_cast<const char*>(from.data());
      for (size_t left = from.size() * sizeof(float); left > 0;) {
        const size_t size = std::min(left, kFrameBytes);
        stream->Write(FrameOf(data, size), stream);
        if (!Wait(&queue_)) return false;
        data += size;
        left -= size;
      }
      stream->WritesDone(stream);
      if (!Wait(&queue_)) return false;
      grpc::ByteBuffer reply;
      stream->Read(&reply, stream);
      return Wait(&queue_);
    });
  }

  absl::Status Pull(absl::Span<float> to) override {
    return Call(kPull, [&](Stream* stream) {
      stream->WriteLast(Small("pull"), grpc::WriteOptions(), stream);
      if (!Wait(&queue_)) return false;
      char* at = reinterpret_cast<char*>(to.data());
      size_t left = to.size() * sizeof(float);
      while (left > 0) {
        grpc::ByteBuffer frame;
        stream->Read(&frame, stream);
        if (!Wait(&queue_) || !CopyFrame(frame, &at, &left)) return false;
      }
      return true;
    });
  }

 private:
  using Stream = grpc::GenericClientAsyncReaderWriter;

  template <typename Body>
  absl::Status Call(const std::string& method, const Body& body) {
    grpc::ClientContext context;
    grpc::GenericStub stub(channel_);
    const std::unique_ptr<Stream> stream = stub.PrepareCall(&context, method, &queue_);
    stream->StartCall(stream.get());
    const bool good = Wait(&queue_) && body(stream.get());
    if (!good) context.TryCancel();
    grpc::Status status;
    stream->Finish(&status, stream.get());
    Wait(&queue_);
    if (status.ok() && good) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(method, ": ", status.error_message()));
  }

  std::shared_ptr<grpc::Channel> channel_;
  grpc::CompletionQueue queue_;
};

}  // namespace

absl::Status ServeRawGrpc(size_t elements, const std::string& ready_file) {
  PrefaultedArray served(elements), received(elements);
  for (size_t i = 0; i < elements; ++i) served.data()[i] = static_cast<float>(i % 1024);

  grpc::AsyncGenericService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.RegisterAsyncGenericService(&service);
  const std::unique_ptr<grpc::ServerCompletionQueue> queue = builder.AddCompletionQueue();
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return absl::InternalError("no port to serve raw gRPC on");
  const absl::Status ready = WriteFileAtomically(ready_file, absl::StrCat("127.0.0.1:", port));
  if (!ready.ok()) return ready;

  while (true) {  // one call after another
    grpc::GenericServerContext context;
    grpc::GenericServerAsyncReaderWriter stream(&context);
    service.RequestCall(&context, &stream, queue.get(), queue.get(), &context);
    if (!Wait(queue.get())) return absl::InternalError("the server has ended");
    bool good = true;
    grpc::ByteBuffer frame;
    if (context.method() == kPush) {
      char* at = reinterpret_cast<char*>(received.data());
      size_t left = received.bytes();
      while (true) {
        stream.Read(&frame, &context);
        if (!Wait(queue.get())) break;
        if (!CopyFrame(frame, &at, &left)) break;
      }
      good = left == 0;
      if (good) {
        stream.Write(Small("done"), &context);
        good = Wait(queue.get());
      }
    } else {
      stream.Read(&frame, &context);
      good = Wait(queue.get());
      const char* at = reinterpret_cast<const char*>(served.data());
      for (size_t left = served.bytes(); good && left > 0;) {
        const size_t size = std::min(left, kFrameBytes);
        stream.Write(FrameOf(at, size), &context);
        good = Wait(queue.get());
        at += size;
        left -= size;
      }
    }
    stream.Finish(good ? grpc::Status::OK : grpc::Status(grpc::StatusCode::INTERNAL, "cut short"),
                  &context);
    Wait(queue.get());
  }
}

std::unique_ptr<RawGrpcClient> RawGrpcClient::Create(const std::string& address) {
  return std::make_unique<RawGrpcClientImpl>(address);
}

}  // namespace codistill
