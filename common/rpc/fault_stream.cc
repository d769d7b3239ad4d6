#include "common/rpc/fault_stream.h"

#include <signal.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/fault.h"
#include "common/base/random.h"

namespace codistill {
namespace {

// A broken stream breaks after fewer messages than this, or at its end.
constexpr uint64_t kLatestBreak = 6;

class FaultStream final : public BulkStream {
 public:
  using Opener = std::function<std::unique_ptr<BulkStream>()>;

  FaultStream(FaultVerdict verdict, Opener open)
      : verdict_(verdict),
        open_(std::move(open)),
        random_(verdict.random),
        break_after_(verdict.random % kLatestBreak),
        stream_(open_()) {
    if (verdict_.delay > absl::ZeroDuration()) absl::SleepFor(verdict_.delay);
  }

  bool Write(grpc::ByteBuffer message) override {
    if (broken_) return false;
    if (verdict_.duplicate) sent_.push_back(message);
    if (!verdict_.reorder || count_ == 0) return Send(std::move(message));
    // The newest message waits: it may be the one that closes the call, which must stay last.
    held_.push_back(std::move(message));
    return held_.size() < 3 || SendHeld(random_.Below(2));
  }

  void WritesDone() override {
    Flush();
    stream_->WritesDone();
  }

  bool Read(grpc::ByteBuffer* message) override {
    Flush();
    if (broken_ || (Breaks() && count_ >= break_after_)) return Break();
    if (!stream_->Read(message)) return false;
    ++count_;
    return true;
  }

  absl::Status Finish() override {
    Flush();
    // A short one breaks after its last message.
    if (Breaks()) Break();
    const absl::Status status = stream_->Finish();
    if (broken_) return absl::UnavailableError("injected fault: the connection was lost");
    if (!status.ok()) return status;
    if (verdict_.duplicate) SendAgain();
    if (verdict_.drop_reply) return absl::UnavailableError("injected fault: the answer was lost");
    return status;
  }

  void Cancel() override { stream_->Cancel(); }

 private:
  bool Breaks() const { return verdict_.drop || verdict_.kill; }
  bool Break() {
    if (broken_) return false;
    if (verdict_.kill) raise(SIGKILL);
    broken_ = true;
    stream_->Cancel();
    return false;
  }

  bool Send(grpc::ByteBuffer message) {
    if (Breaks() && count_ >= break_after_) return Break();
    ++count_;
    return stream_->Write(std::move(message));
  }

  bool SendHeld(size_t index) {
    grpc::ByteBuffer message = std::move(held_[index]);
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
    return Send(std::move(message));
  }

  void Flush() {
    while (!broken_ && !held_.empty() && SendHeld(held_.size() > 2 ? random_.Below(2) : 0)) {
    }
    held_.clear();
  }

  void SendAgain() {
    const std::unique_ptr<BulkStream> again = open_();
    for (grpc::ByteBuffer& message : sent_) {
      if (!again->Write(std::move(message))) break;
    }
    sent_.clear();
    again->WritesDone();
    grpc::ByteBuffer unwanted;
    again->Read(&unwanted);
    again->Finish().IgnoreError();
  }

  const FaultVerdict verdict_;
  const Opener open_;
  RandomStream random_;
  const uint64_t break_after_;
  uint64_t count_ = 0;  // messages sent and received
  bool broken_ = false;
  std::vector<grpc::ByteBuffer> held_;
  std::vector<grpc::ByteBuffer> sent_;
  const std::unique_ptr<BulkStream> stream_;
};

}  // namespace

std::unique_ptr<BulkStream> OpenWithFaults(const std::string& full_method,
                                           std::function<std::unique_ptr<BulkStream>()> open) {
  if (!FaultInjector::Global().enabled()) return open();
  const FaultVerdict verdict = FaultInjector::Global().Hit(absl::StrCat("stream:", full_method));
  if (!verdict.any()) return open();
  return std::make_unique<FaultStream>(verdict, std::move(open));
}

}  // namespace codistill
