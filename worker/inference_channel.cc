#include "worker/inference_channel.h"

#include <thread>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"

namespace codistill {
namespace {

constexpr char kModelInfer[] = "/inference.GRPCInferenceService/ModelInfer";

class PendingCall : public InferenceChannel::Call {
 public:
  PendingCall(InferenceQuestion question, absl::Time deadline, InferenceChannel::Done done)
      : question_(std::move(question)),
        done_(std::move(done)),
        context_(MakeContext(deadline)),
        request_(EncodeQuestion(question_)) {}

  void Start(grpc::GenericStub* stub, grpc::CompletionQueue* queue) {
    reader_ = stub->PrepareUnaryCall(context_.get(), kModelInfer, request_, queue);
    request_.Clear();  // gRPC has its own references
    reader_->StartCall();
    reader_->Finish(&response_, &status_, this);
  }

  void Cancel() override { context_->TryCancel(); }

  void Complete() {
    if (!status_.ok()) return done_(FromGrpcStatus(status_));
    absl::StatusOr<InferenceAnswer> answer = DecodeAnswer(&response_, question_);
    response_.Clear();
    done_(std::move(answer));
  }

 private:
  const InferenceQuestion question_;
  const InferenceChannel::Done done_;
  const std::unique_ptr<grpc::ClientContext> context_;
  grpc::ByteBuffer request_;
  std::unique_ptr<grpc::ClientAsyncResponseReader<grpc::ByteBuffer>> reader_;
  grpc::ByteBuffer response_;
  grpc::Status status_;
};

class GrpcInferenceChannel : public InferenceChannel {
 public:
  explicit GrpcInferenceChannel(const std::vector<std::string>& addresses) {
    for (const std::string& address : addresses) {
      channels_.push_back(MakeChannel(address, ChannelUse::kPrediction));
      channels_.back()->GetState(/*try_to_connect=*/true);
      stubs_.push_back(std::make_unique<grpc::GenericStub>(channels_.back()));
    }
    thread_ = std::thread([this] { Run(); });
  }

  ~GrpcInferenceChannel() override {
    {
      MutexLock lock(&mu_);
      closed_ = true;
      for (const auto& call : calls_) call->Cancel();
      queue_.Shutdown();
    }
    thread_.join();
  }

  std::shared_ptr<Call> Ask(int endpoint, InferenceQuestion question, absl::Time deadline,
                            Done done) override {
    auto call = std::make_shared<PendingCall>(std::move(question), deadline, std::move(done));
    MutexLock lock(&mu_);
    // Only a caller that destroys the channel at the same time could get here with it closed.
    if (closed_) return call;
    calls_.insert(call);
    call->Start(stubs_[endpoint].get(), &queue_);
    return call;
  }

 private:
  void Run() {
    SetThreadName("teacher-answers");
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      auto* call = static_cast<PendingCall*>(tag);
      call->Complete();
      MutexLock lock(&mu_);
      calls_.erase(calls_.find(call));
    }
  }

  // Finds shared pointers by the plain one that comes back as a tag.
  struct Hash {
    using is_transparent = void;
    size_t operator()(const PendingCall* call) const { return absl::Hash<const void*>()(call); }
    size_t operator()(const std::shared_ptr<PendingCall>& call) const {
      return (*this)(call.get());
    }
  };
  struct Equal {
    using is_transparent = void;
    static const PendingCall* Plain(const PendingCall* call) { return call; }
    static const PendingCall* Plain(const std::shared_ptr<PendingCall>& call) { return call.get(); }
    template <typename A, typename B>
    bool operator()(const A& a, const B& b) const {
      return Plain(a) == Plain(b);
    }
  };

  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;
  grpc::CompletionQueue queue_;
  Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  // Keeps calls alive until their completion has been handled.
  absl::flat_hash_set<std::shared_ptr<PendingCall>, Hash, Equal> calls_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace

std::unique_ptr<InferenceChannel> InferenceChannel::Create(
    const std::vector<std::string>& addresses) {
  return std::make_unique<GrpcInferenceChannel>(addresses);
}

}  // namespace codistill
