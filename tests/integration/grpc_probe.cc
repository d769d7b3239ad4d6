#include "tests/integration/grpc_probe.h"

#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"

namespace codistill {
namespace {

// One message to and fro over a call of any kind; the server's first message is the answer.
absl::StatusOr<std::string> CallOnce(const std::string& address, const std::string& method,
                                     const std::string& request, absl::Duration timeout) {
  grpc::GenericStub stub(MakeChannel(address, ChannelUse::kControl));
  const auto context = MakeContext(absl::Now() + timeout);
  grpc::CompletionQueue queue;
  const std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call =
      stub.PrepareCall(context.get(), method, &queue);
  // The deadline ends every operation, so each of these comes back.
  const auto await = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  std::string answer;
  grpc::Slice slice(request);
  grpc::ByteBuffer buffer(&slice, 1);
  call->StartCall(nullptr);
  bool done = await();
  if (done) {
    call->WriteLast(buffer, grpc::WriteOptions(), nullptr);
    done = await();
  }
  if (done) {
    grpc::ByteBuffer reply;
    call->Read(&reply, nullptr);
    if (await()) {
      grpc::Slice whole;
      if (reply.TrySingleSlice(&whole).ok() || reply.DumpToSingleSlice(&whole).ok()) {
        answer.assign(reinterpret_cast<const char*>(whole.begin()), whole.size());
      }
    }
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  await();
  queue.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue.Next(&tag, &ok)) {
  }
  if (!status.ok()) return FromGrpcStatus(status);
  return answer;
}

}  // namespace

absl::StatusOr<bool> Healthy(const std::string& address, absl::Duration timeout) {
  // An empty request asks for the server as a whole.
  const absl::StatusOr<std::string> answer =
      CallOnce(address, "/grpc.health.v1.Health/Check", "", timeout);
  if (!answer.ok()) return answer.status();
  return *answer == std::string("\x08\x01", 2);  // field 1, SERVING
}

absl::StatusOr<std::string> ReflectedServices(const std::string& address, absl::Duration timeout) {
  // Field 7, list_services: any text.
  return CallOnce(address, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                  "\x3a\x01*", timeout);
}

}  // namespace codistill
