#include "common/client/row_client.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/executor.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/client/call_group.h"
#include "common/client/row_split.h"
#include "common/rpc/bulk_channel.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/frame.h"

namespace codistill {
namespace {

constexpr char kPullRowsMethod[] = "/codistill.TensorTransfer/PullRows";
// Calls that wait for a thread. More come from a caller that never waits for its reads.
constexpr size_t kMaxWaitingCalls = 4096;

// Reads rows that came in parts, one after the other.
class PartReader {
 public:
  explicit PartReader(absl::Span<const absl::Span<const uint8_t>> parts) : parts_(parts) {}

  void Read(size_t size, uint8_t* to) {
    while (size > 0) {
      if (at_ == parts_[part_].size()) {
        ++part_;
        at_ = 0;
        continue;
      }
      const size_t n = std::min(size, parts_[part_].size() - at_);
      std::memcpy(to, parts_[part_].data() + at_, n);
      to += n;
      at_ += n;
      size -= n;
    }
  }

 private:
  const absl::Span<const absl::Span<const uint8_t>> parts_;
  size_t part_ = 0;
  size_t at_ = 0;
};

struct Shards {
  RowClient::Options options;
  std::vector<std::shared_ptr<BulkChannel>> channels;

  std::string Label(int shard) const {
    return absl::StrCat("shard ", shard, " (", options.shard_addresses[shard], ")");
  }
};

// One Start. Shared by its calls and whoever waits.
class Read final {
 public:
  Read(std::shared_ptr<const Shards> shards, const RowClient::Request& request, absl::Time deadline)
      : shards_(std::move(shards)),
        request_(request),
        deadline_(deadline),
        split_(request.keys, static_cast<int>(shards_->channels.size())) {
    for (int shard = 0; shard < static_cast<int>(shards_->channels.size()); ++shard) {
      const size_t count = split_.keys(shard).size();
      for (size_t at = 0; at < count; at += RowClient::kMaxKeysACall) {
        calls_.push_back({shard, at, std::min(RowClient::kMaxKeysACall, count - at)});
      }
    }
    left_ = calls_.size();
  }

  size_t num_calls() const { return calls_.size(); }

  void Run(size_t index) {
    const Call& call = calls_[index];
    absl::Status status = group_.status();
    if (status.ok()) status = Annotate(Transfer(call), shards_->Label(call.shard));
    Ended(status);
  }

  void Ended(const absl::Status& status) {
    group_.Fail(status);
    MutexLock lock(&mu_);
    --left_;
  }

  void Cancel() { group_.Fail(absl::CancelledError("the rows are not wanted any more")); }

  absl::StatusOr<RowClient::Result> Wait() {
    MutexLock lock(&mu_);
    // Calls end by the deadline.
    mu_.Await(absl::Condition(this, &Read::AllEnded));
    CODISTILL_RETURN_IF_ERROR(group_.status());
    return result_;
  }

 private:
  struct Call {
    int shard;
    size_t first;  // of the shard's keys
    size_t count;
  };

  bool AllEnded() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return left_ == 0; }

  absl::Status Transfer(const Call& call) {
    PullRowsRequest message;
    *message.mutable_group() = shards_->options.group;
    message.set_generation(request_.generation);
    message.set_shard_map_digest(shards_->options.shard_map_digest);
    if (request_.source == TensorClient::Source::kStep) {
      message.set_step(request_.step);
    } else {
      message.set_at_least_step(request_.step);
    }
    message.set_table(request_.table);
    message.set_dim(request_.dim);
    const absl::Span<const uint64_t> keys = split_.keys(call.shard).subspan(call.first, call.count);
    // gRPC may hold the bytes for longer than the call lasts.
    const auto copy = std::make_shared<std::vector<uint64_t>>(keys.begin(), keys.end());
    const PayloadRef payload = {copy->data(), copy->size() * sizeof(uint64_t), copy};

    const std::unique_ptr<BulkStream> stream =
        shards_->channels[call.shard]->Open(kPullRowsMethod, deadline_);
    CallGroup::Member member(&group_, stream.get());
    grpc::ByteBuffer out = EncodeWithPayload(message, PullRowsRequest::kKeysFieldNumber,
                                             absl::MakeConstSpan(&payload, 1));
    uint64_t bytes = out.Length();
    stream->Write(std::move(out));
    stream->WritesDone();
    size_t received = 0;
    bool begun = false, ended = false;
    grpc::ByteBuffer in;
    while (stream->Read(&in)) {
      bytes += in.Length();
      if (absl::Status status = Take(call, &in, &begun, &ended, &received); !status.ok()) {
        stream->Cancel();
        return status;
      }
    }
    CODISTILL_RETURN_IF_ERROR(stream->Finish());
    if (!ended) {
      return absl::DataLossError(absl::StrCat("the rows ended after ", received, " of ", call.count,
                                              ", without a PullEnd"));
    }
    MutexLock lock(&mu_);
    result_.bytes += bytes;
    return absl::OkStatus();
  }

  absl::Status Take(const Call& call, grpc::ByteBuffer* message, bool* begun, bool* ended,
                    size_t* received) {
    TensorFrame frame;
    DecodedPayload payload;
    if (absl::Status status =
            DecodedPayload::Decode(message, TensorFrame::kPayloadFieldNumber, &frame, &payload);
        !status.ok()) {
      return absl::DataLossError(absl::StrCat("bad frame: ", status.message()));
    }
    const FrameHeader& header = frame.header();
    if (!*begun) {
      if (!header.has_pull_begin()) return absl::DataLossError("the first frame is no PullBegin");
      *begun = true;
      return CheckVersion(header.pull_begin().version());
    }
    if (header.has_pull_end() && !*ended && *received == call.count) {
      *ended = true;
      return absl::OkStatus();
    }
    const RowChunk& chunk = header.rows();
    const size_t row_bytes = request_.dim * sizeof(float);
    const size_t count = static_cast<size_t>(chunk.count());
    if (*ended || !header.has_rows() || chunk.table() != static_cast<uint32_t>(request_.table) ||
        chunk.dim() != static_cast<uint32_t>(request_.dim) ||
        chunk.first() != static_cast<int64_t>(*received) || chunk.count() < 1 ||
        count > call.count - *received || payload.count() != 1 ||
        payload.size(0) != count * row_bytes) {
      return absl::DataLossError(absl::StrCat(
          "frame of ", chunk.count(), " rows of ", chunk.dim(), " floats from ", chunk.first(),
          " on of table ", chunk.table(), " with ", payload.count() == 1 ? payload.size(0) : 0,
          " bytes; rows from ", *received, " on of ", call.count, " were due, of table ",
          request_.table, " with ", request_.dim, " floats"));
    }
    auto* const rows = reinterpret_cast<uint8_t*>(request_.rows);
    if (split_.contiguous()) {
      payload.CopyTo(0, rows + (call.first + *received) * row_bytes);
    } else {
      PartReader reader(payload.parts(0));
      for (size_t i = 0; i < count; ++i) {
        reader.Read(row_bytes,
                    rows + split_.place(call.shard, call.first + *received + i) * row_bytes);
      }
    }
    *received += count;
    return absl::OkStatus();
  }

  // A shard that answers with another version than asked for must not go unnoticed.
  absl::Status CheckVersion(const Version& version) const {
    if (version.generation() != request_.generation) {
      return absl::AbortedError(absl::StrCat("answered for generation ", version.generation(),
                                             ", asked for ", request_.generation));
    }
    const bool right = request_.source == TensorClient::Source::kStep
                           ? version.step() == request_.step
                           : version.step() >= request_.step;
    if (right) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat("answered with step ", version.step(), ", asked for ", request_.step));
  }

  const std::shared_ptr<const Shards> shards_;
  const RowClient::Request request_;
  const absl::Time deadline_;
  const RowSplit split_;
  std::vector<Call> calls_;
  CallGroup group_;
  Mutex mu_;
  size_t left_ ABSL_GUARDED_BY(mu_) = 0;
  RowClient::Result result_ ABSL_GUARDED_BY(mu_);
};

class PendingImpl final : public RowClient::Pending {
 public:
  explicit PendingImpl(std::shared_ptr<Read> read) : read_(std::move(read)) {}
  ~PendingImpl() override {
    if (waited_) return;
    read_->Cancel();
    read_->Wait().status().IgnoreError();
  }
  absl::StatusOr<RowClient::Result> Wait() override {
    waited_ = true;
    return read_->Wait();
  }

 private:
  const std::shared_ptr<Read> read_;
  bool waited_ = false;
};

class RowClientImpl final : public RowClient {
 public:
  RowClientImpl(std::shared_ptr<const Shards> shards, std::unique_ptr<Executor> executor)
      : shards_(std::move(shards)), executor_(std::move(executor)) {}

  std::unique_ptr<Pending> Start(const Request& request, absl::Time deadline) override {
    auto read = std::make_shared<Read>(shards_, request, deadline);
    for (size_t i = 0, n = read->num_calls(); i < n; ++i) {
      const absl::Status status = executor_->Schedule([read, i] { read->Run(i); });
      if (!status.ok()) read->Ended(status);
    }
    return std::make_unique<PendingImpl>(std::move(read));
  }

 private:
  const std::shared_ptr<const Shards> shards_;
  const std::unique_ptr<Executor> executor_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RowClient>> RowClient::Create(Options options) {
  if (options.shard_addresses.empty()) return absl::InvalidArgumentError("no shard addresses");
  if (options.max_calls < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_calls: ", options.max_calls, "; at least 1 is right"));
  }
  CODISTILL_ASSIGN_OR_RETURN(std::unique_ptr<Executor> executor,
                             Executor::Create({"rows", options.max_calls, kMaxWaitingCalls}));
  auto shards = std::make_shared<Shards>();
  BulkChannel::Options channel;
  channel.shared_memory = options.shared_memory;
  for (const std::string& address : options.shard_addresses) {
    shards->channels.push_back(BulkChannel::Create(address, channel));
  }
  shards->options = std::move(options);
  return std::make_unique<RowClientImpl>(std::move(shards), std::move(executor));
}

}  // namespace codistill
