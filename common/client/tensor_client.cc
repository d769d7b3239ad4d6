#include "common/client/tensor_client.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/mutex.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "common/client/call_group.h"
#include "common/client/push_verdict.h"
#include "common/client/row_split.h"
#include "common/client/shard_layout.h"
#include "common/client/shard_pull.h"
#include "common/client/shard_push.h"
#include "common/rpc/bulk_channel.h"
#include "common/rpc/frame.h"
#include "glog/logging.h"

namespace codistill {
namespace {

// Held by every push too, so that a stream does not depend on its client's lifetime.
struct Shards {
  GroupRef group;
  ShardLayout layout;
  std::vector<std::string> addresses;
  std::vector<std::shared_ptr<BulkChannel>> channels;
  DataType push_dtype = DT_FLOAT;  // of fp32 gradients

  std::string Label(int shard) const {
    return absl::StrCat("shard ", shard, " (", addresses[shard], ")");
  }
};

class PushStreamImpl final : public PushStream {
 public:
  PushStreamImpl(std::shared_ptr<const Shards> shards, const TensorClient::PushHeader& header,
                 absl::Time deadline)
      : shards_(std::move(shards)), verdict_(shards_->layout.num_shards()) {
    PushBegin begin;
    *begin.mutable_group() = shards_->group;
    begin.set_generation(header.generation);
    begin.set_step(header.step);
    begin.set_rank(header.rank);
    begin.set_incarnation(header.incarnation);
    begin.set_shard_map_digest(shards_->layout.digest());
    begin.set_end_example(header.end_example);
    for (int i = 0; i < shards_->layout.num_shards(); ++i) {
      const size_t shard = static_cast<size_t>(i);
      begin.set_weights_step(shard < header.shard_steps.size() ? header.shard_steps[shard]
                                                               : header.weights_step);
      begin.set_shard_incarnation(
          shard < header.shard_incarnations.size() ? header.shard_incarnations[shard] : 0);
      pushes_.push_back(std::make_unique<ShardPush>(shards_->channels[i], begin, deadline, i,
                                                    shards_->Label(i), &group_, &verdict_));
    }
  }

  ~PushStreamImpl() override {
    if (!waited_) group_.Fail(absl::CancelledError("push abandoned"));
  }

  void AddGradient(int index, const float* data, std::shared_ptr<const void> owner) override {
    if (shards_->layout.frozen(index)) return;
    Add(index, TensorChunk::GRADIENT, shards_->push_dtype, sizeof(float), data, std::move(owner));
  }

  void AddBuffer(int index, const void* data, std::shared_ptr<const void> owner) override {
    const DataType dtype = shards_->layout.tensor(index).dtype();
    Add(index, TensorChunk::VALUE, dtype, ElementSize(dtype), data, std::move(owner));
  }

  void AddWorkerState(std::string state) override {
    const auto owner = std::make_shared<const std::string>(std::move(state));
    ShardPush::Part part;
    part.chunk.set_dtype(DT_UINT8);
    part.chunk.set_content(TensorChunk::WORKER_STATE);
    part.name = "worker state";
    AddChunks(pushes_[0].get(), part, 0, static_cast<int64_t>(owner->size()), 1, 1, owner->data(),
              owner);
  }

  void AddRows(int table, absl::string_view name, int dim, absl::Span<const uint64_t> keys,
               const float* gradients) override {
    RowSplit split(keys, shards_->layout.num_shards());
    const size_t row_bytes = dim * sizeof(float);
    const size_t step = std::max<size_t>(kFramePayloadBytes / (sizeof(uint64_t) + row_bytes), 1);
    for (int shard = 0; shard < shards_->layout.num_shards(); ++shard) {
      const absl::Span<const uint64_t> own = split.keys(shard);
      for (size_t at = 0; at < own.size(); at += step) {
        const absl::Span<const uint64_t> part_keys = own.subspan(at, step);
        const size_t n = part_keys.size();
        ShardPush::Part part;
        part.rows.set_table(table);
        part.rows.set_dim(dim);
        part.rows.set_count(n);
        part.name = absl::StrCat("embedding table ", name);
        part.size = n * (sizeof(uint64_t) + row_bytes);
        // Keys, then their rows, as on the wire.
        const std::shared_ptr<uint8_t> bytes(new uint8_t[part.size],
                                             std::default_delete<uint8_t[]>());
        std::memcpy(bytes.get(), part_keys.data(), n * sizeof(uint64_t));
        uint8_t* const rows = bytes.get() + n * sizeof(uint64_t);
        split.CopyRows(shard, at, n, row_bytes, gradients, rows);
        part.data = bytes.get();
        part.owner = bytes;
        pushes_[shard]->Add(std::move(part));
      }
    }
  }

  void Cancel() override { group_.Fail(absl::CancelledError("push cancelled")); }

  void End(PushEnd end) override {
    CHECK(!ended_) << "End is called once";
    ended_ = true;
    for (const auto& push : pushes_) push->SendEnd(end);
  }

  absl::StatusOr<Result> Wait() override {
    CHECK(ended_ && !waited_) << "Wait is called once, after End";
    waited_ = true;
    Result result;
    for (size_t i = 0; i < pushes_.size(); ++i) {
      const absl::StatusOr<PushReply> reply = pushes_[i]->Wait();
      result.bytes += pushes_[i]->bytes();
      if (!reply.ok()) continue;
      if (i == 0) result.step = reply->step();
      // One decision for all shards in SYNC; in ASYNC each has its own, and what is told is the
      // first that is not APPLIED.
      if (i == 0 || (result.outcome == APPLIED && reply->outcome() != APPLIED)) {
        result.outcome = reply->outcome();
        result.message = reply->message();
      }
    }
    CODISTILL_RETURN_IF_ERROR(group_.status());
    return result;
  }

 private:
  // `dtype`: on the wire; `element_size`: in memory.
  void Add(int index, TensorChunk::Content content, DataType dtype, size_t element_size,
           const void* data, std::shared_ptr<const void> owner) {
    const ShardLayout& layout = shards_->layout;
    ShardPush::Part part;
    part.chunk.set_tensor(index);
    part.chunk.set_dtype(dtype);
    part.chunk.set_content(content);
    part.name = layout.tensor(index).name();
    for (const Piece& piece : layout.of_tensor(index)) {
      AddChunks(pushes_[piece.shard()].get(), part, piece.begin(), piece.count(),
                ElementSize(dtype), element_size, static_cast<const char*>(data), owner);
    }
  }

  // `data`: of the whole tensor.
  void AddChunks(ShardPush* push, ShardPush::Part part, int64_t begin, int64_t count,
                 size_t wire_size, size_t element_size, const char* data,
                 const std::shared_ptr<const void>& owner) {
    const int64_t step = kFramePayloadBytes / static_cast<int64_t>(wire_size);
    const int64_t end = begin + count;
    for (int64_t at = begin; at < end; at += step) {
      const int64_t n = std::min(step, end - at);
      part.chunk.set_begin(at);
      part.chunk.set_count(n);
      part.data = data + at * element_size;
      part.size = n * wire_size;
      part.owner = owner;
      push->Add(part);
    }
  }

  const std::shared_ptr<const Shards> shards_;
  CallGroup group_;      // outlives the pushes
  PushVerdict verdict_;  // too
  std::vector<std::unique_ptr<ShardPush>> pushes_;
  bool ended_ = false;
  bool waited_ = false;
};

class TensorClientImpl final : public TensorClient {
 public:
  TensorClientImpl(std::shared_ptr<const Shards> shards, DataType transfer_dtype)
      : shards_(std::move(shards)), transfer_dtype_(transfer_dtype) {}

  absl::StatusOr<PullResult> Pull(Source source, uint64_t generation, int64_t step,
                                  absl::Span<const TensorView> tensors,
                                  absl::Time deadline) override;

  void CancelPull() override {
    MutexLock lock(&mu_);
    if (pulling_ != nullptr) pulling_->Fail(absl::CancelledError("pull cancelled"));
  }

  StreamCounts stream_counts() const override {
    StreamCounts counts;
    for (const auto& channel : shards_->channels) {
      const BulkChannel::Counts one = channel->counts();
      counts.shared_memory += one.shared_memory;
      counts.grpc += one.grpc;
    }
    return counts;
  }

  std::unique_ptr<PushStream> StartPush(const PushHeader& header, absl::Time deadline) override {
    return std::make_unique<PushStreamImpl>(shards_, header, deadline);
  }

 private:
  absl::Status CheckViews(absl::Span<const TensorView> tensors) const;
  absl::Status CheckVersion(Source source, uint64_t generation, int64_t step,
                            const Version& version) const;

  void SetPulling(CallGroup* group) {
    MutexLock lock(&mu_);
    pulling_ = group;
  }

  const std::shared_ptr<const Shards> shards_;
  const DataType transfer_dtype_;
  Mutex mu_;
  CallGroup* pulling_ ABSL_GUARDED_BY(mu_) = nullptr;
};

absl::Status TensorClientImpl::CheckViews(absl::Span<const TensorView> tensors) const {
  const ShardMap& map = shards_->layout.map();
  if (static_cast<int>(tensors.size()) != map.tensors_size()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "got views of ", tensors.size(), " tensors; the shard map has ", map.tensors_size()));
  }
  for (int i = 0; i < map.tensors_size(); ++i) {
    const TensorSpec& spec = map.tensors(i);
    if (spec.role() == TensorSpec::TIED) continue;
    const TensorView& view = tensors[i];
    if (view.dtype != spec.dtype() || view.elements() != shards_->layout.elements(i) ||
        (view.data == nullptr && view.elements() > 0)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "view ", i, " (", view.name, ") is ", DataTypeName(view.dtype), " ",
          ShapeString(view.shape), "; tensor ", spec.name(), " of the shard map is ",
          DataTypeName(spec.dtype()), " ",
          ShapeString(std::vector<int64_t>(spec.shape().begin(), spec.shape().end()))));
    }
  }
  return absl::OkStatus();
}

// A shard that answers with another version than asked for must not go unnoticed.
absl::Status TensorClientImpl::CheckVersion(Source source, uint64_t generation, int64_t step,
                                            const Version& version) const {
  if (version.generation() != generation) {
    return absl::AbortedError(
        absl::StrCat("answered for generation ", version.generation(), ", asked for ", generation));
  }
  const bool right =
      source == Source::kAtLeastStep
          ? (version.shard_steps_size() > 0 ? version.shard_steps(0) : version.step()) >= step
          : version.step() == step;
  if (!right) {
    return absl::DataLossError(
        absl::StrCat("answered with step ", version.step(), ", asked for ", step));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorClient::PullResult> TensorClientImpl::Pull(
    Source source, uint64_t generation, int64_t step, absl::Span<const TensorView> tensors,
    absl::Time deadline) {
  CODISTILL_RETURN_IF_ERROR(CheckViews(tensors));
  PullRequest request;
  *request.mutable_group() = shards_->group;
  request.set_generation(generation);
  request.set_shard_map_digest(shards_->layout.digest());
  if (transfer_dtype_ != DT_FLOAT) request.set_transfer_dtype(transfer_dtype_);
  switch (source) {
    case Source::kStep:
      request.set_step(step);
      break;
    case Source::kAtLeastStep:
      request.set_at_least_step(step);
      break;
    case Source::kCut:
      request.set_cut_step(step);
      break;
  }

  const int num_shards = shards_->layout.num_shards();
  TraceSpan whole("pull call", "pull", "pull");
  whole.Arg("step", step);
  CallGroup group;
  SetPulling(&group);
  std::vector<ShardPullResult> results(num_shards);
  auto pull = [&](int shard) {
    auto result = PullShard(shards_->channels[shard].get(), request, shards_->layout, shard,
                            tensors, deadline, &group);
    absl::Status status = result.status();
    if (status.ok()) status = CheckVersion(source, generation, step, result->version);
    if (status.ok()) results[shard] = *std::move(result);
    group.Fail(Annotate(status, shards_->Label(shard)));
  };
  std::vector<std::thread> threads;
  for (int shard = 1; shard < num_shards; ++shard) threads.emplace_back(pull, shard);
  pull(0);
  for (std::thread& thread : threads) thread.join();
  SetPulling(nullptr);
  CODISTILL_RETURN_IF_ERROR(group.status());

  PullResult result;
  result.version.set_generation(generation);
  result.version.set_step(results[0].version.step());
  for (const ShardPullResult& shard : results) {
    result.bytes += shard.bytes;
    for (int64_t shard_step : shard.version.shard_steps()) {
      result.version.add_shard_steps(shard_step);
    }
    for (uint64_t incarnation : shard.version.shard_incarnations()) {
      result.version.add_shard_incarnations(incarnation);
    }
  }
  whole.Arg("bytes", static_cast<int64_t>(result.bytes));
  return result;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TensorClient>> TensorClient::Create(Options options) {
  if (options.push_dtype != DT_FLOAT && options.push_dtype != DT_HALF) {
    return absl::InvalidArgumentError(
        absl::StrCat("push_dtype: ", DataTypeName(options.push_dtype), "; FP32 or FP16 is right"));
  }
  auto shards = std::make_shared<Shards>();
  shards->push_dtype = options.push_dtype;
  CODISTILL_ASSIGN_OR_RETURN(shards->layout, ShardLayout::Create(std::move(options.shard_map)));
  if (static_cast<int>(options.shard_addresses.size()) != shards->layout.num_shards()) {
    return absl::InvalidArgumentError(absl::StrCat("the shard map has ",
                                                   shards->layout.num_shards(), " shards, got ",
                                                   options.shard_addresses.size(), " addresses"));
  }
  shards->group = std::move(options.group);
  BulkChannel::Options channel;
  channel.shared_memory = options.shared_memory;
  for (const std::string& address : options.shard_addresses) {
    shards->channels.push_back(BulkChannel::Create(address, channel));
  }
  shards->addresses = std::move(options.shard_addresses);
  return std::make_unique<TensorClientImpl>(std::move(shards), options.transfer_dtype);
}

}  // namespace codistill
