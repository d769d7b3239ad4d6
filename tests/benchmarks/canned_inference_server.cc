// A server of the Open Inference Protocol, version 2, that answers every ModelInfer alike, without
// looking at it, from bytes made once: a teacher that costs as little as one can.
//
//   canned_inference_server --ready_file=F --outputs=logits:64,10;h:2,64,32 [--sleep_ms=N]
//
// Every answer says generation 1, step 1, and comes N milliseconds after its question. F gets
// {"address": ...} once it listens; --port takes one of one's own.

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/tensor/tensor.h"
#include "grpcpp/alarm.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "proto/open_inference.pb.h"
#include "tests/benchmarks/harness.h"

ABSL_FLAG(std::string, ready_file, "", "Where the address is written.");
ABSL_FLAG(std::string, outputs, "", "NAME:DIM,DIM;NAME:DIM,...");
ABSL_FLAG(int, sleep_ms, 0, "From a question to its answer.");
ABSL_FLAG(int, port, 0, "0: the kernel's choice.");

namespace codistill {
namespace {

constexpr int kRawOutputField = 6;  // ModelInferResponse.raw_output_contents

// The first output is standard normal numbers, the others zeros.
grpc::ByteBuffer Answer(const std::string& outputs) {
  inference::ModelInferResponse response;
  for (const char* name : {"generation", "step", "latest_step"}) {
    (*response.mutable_parameters())[name].set_int64_param(1);
  }
  response.set_model_version("1.1");
  std::vector<PayloadRef> payloads;
  RandomStream random(7);
  for (const absl::string_view spec : absl::StrSplit(outputs, ';')) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(spec, ':');
    auto* output = response.add_outputs();
    output->set_name(parts.first);
    output->set_datatype("FP32");
    for (const absl::string_view text : absl::StrSplit(parts.second, ',')) {
      int64_t dimension = 0;
      if (!absl::SimpleAtoi(text, &dimension)) {
        std::fprintf(stderr, "--outputs: \"%s\" is no dimension\n", std::string(text).c_str());
        std::exit(2);
      }
      output->add_shape(dimension);
    }
    Tensor tensor = Tensor::Zeros(DT_FLOAT, {output->shape().begin(), output->shape().end()});
    if (payloads.empty()) {
      for (float& value : tensor.As<float>()) value = static_cast<float>(random.Normal());
    }
    payloads.push_back({tensor.data(), tensor.bytes(), tensor.owner()});
  }
  return EncodeWithPayload(response, kRawOutputField, payloads);
}

// One call, from its arrival on; deletes itself.
class Call {
 public:
  Call(grpc::AsyncGenericService* service, grpc::ServerCompletionQueue* queue,
       const grpc::ByteBuffer* answer, absl::Duration sleep)
      : service_(service), queue_(queue), answer_(answer), sleep_(sleep), stream_(&context_) {
    service_->RequestCall(&context_, &stream_, queue_, queue_, this);
  }

  void Next(bool ok) {
    switch (state_) {
      case kArrived:
        if (!ok) break;
        new Call(service_, queue_, answer_, sleep_);
        state_ = kRead;
        return stream_.Read(&question_, this);
      case kRead:
        if (!ok) break;
        question_.Clear();
        state_ = kSlept;
        if (sleep_ > absl::ZeroDuration()) {
          return alarm_.Set(queue_, absl::ToChronoTime(absl::Now() + sleep_), this);
        }
        [[fallthrough]];
      case kSlept:
        state_ = kAnswered;
        return stream_.WriteAndFinish(*answer_, {}, grpc::Status::OK, this);
      case kAnswered:
        break;
    }
    delete this;
  }

 private:
  grpc::AsyncGenericService* const service_;
  grpc::ServerCompletionQueue* const queue_;
  const grpc::ByteBuffer* const answer_;
  const absl::Duration sleep_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_;
  grpc::ByteBuffer question_;
  grpc::Alarm alarm_;
  enum { kArrived, kRead, kSlept, kAnswered } state_ = kArrived;
};

int Main() {
  const grpc::ByteBuffer answer = Answer(absl::GetFlag(FLAGS_outputs));
  grpc::AsyncGenericService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(absl::StrCat("127.0.0.1:", absl::GetFlag(FLAGS_port)),
                           grpc::InsecureServerCredentials(), &port);
  builder.RegisterAsyncGenericService(&service);
  builder.SetMaxReceiveMessageSize(kMaxPredictionBytes);
  const auto queue = builder.AddCompletionQueue();
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    std::fprintf(stderr, "canned_inference_server: cannot listen\n");
    return 1;
  }
  const absl::Status written = WriteFileAtomically(
      absl::GetFlag(FLAGS_ready_file), absl::StrCat("{\"address\": \"127.0.0.1:", port, "\"}\n"));
  if (!written.ok()) {
    std::fprintf(stderr, "%s\n", written.ToString().c_str());
    return 1;
  }
  new Call(&service, queue.get(), &answer, absl::Milliseconds(absl::GetFlag(FLAGS_sleep_ms)));
  void* tag = nullptr;
  bool ok = false;
  while (queue->Next(&tag, &ok)) static_cast<Call*>(tag)->Next(ok);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::RetainHeap();
  absl::ParseCommandLine(argc, argv);
  return codistill::Main();
}
