#include "common/client/fake_shards.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/rpc/bulk_server.h"
#include "common/rpc/server.h"
#include "common/tensor/tensor.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

constexpr int64_t kChunkElements = 5000;  // small enough that tensors of a test take several

grpc::ByteBuffer ToBuffer(const google::protobuf::MessageLite& message) {
  const std::string bytes = message.SerializeAsString();
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

template <typename Message>
Message FromBuffer(grpc::ByteBuffer* buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer->Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  Message message;
  EXPECT_TRUE(message.ParseFromString(bytes));
  return message;
}

}  // namespace

struct FakeShards::Server {
  BulkServer bulk{1};
  std::unique_ptr<RpcServer> rpc;
};

class FakeShards::PullHandler : public BulkHandler {
 public:
  PullHandler(FakeShards* fake, int shard) : fake_(fake), shard_(shard) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }
  void OnMessage(grpc::ByteBuffer message) override {
    const auto request = FromBuffer<PullRequest>(&message);
    const int64_t step = request.has_step()            ? request.step()
                         : request.has_at_least_step() ? request.at_least_step()
                                                       : request.cut_step();
    MutexLock lock(&fake_->mu_);
    ++fake_->pulls_;
    if (fake_->hang_) return;
    if (request.shard_map_digest() != fake_->layout_.digest()) {
      call_->Finish(absl::FailedPreconditionError("digest differs"));
      return;
    }
    const auto cut = fake_->cuts_.find({request.generation(), step});
    if (cut == fake_->cuts_.end()) {
      call_->Finish(absl::AbortedError(absl::StrCat("no cut ", request.generation(), ".", step)));
      return;
    }
    MakeFrames(request.generation(), step, cut->second);
    int index = 0;
    if (fake_->filter_ != nullptr) {
      frames_.erase(std::remove_if(frames_.begin(), frames_.end(),
                                   [&](TensorFrame& frame) {
                                     return !fake_->filter_(shard_, index++, &frame);
                                   }),
                    frames_.end());
    }
    WriteNext();
  }
  void OnHalfClose() override {}
  void OnWritten() override { WriteNext(); }
  void OnDone(bool) override {}

 private:
  void MakeFrames(uint64_t generation, int64_t step, const Cut& cut) {
    std::vector<TensorFrame> chunks;
    int64_t bytes = 0;
    for (const Piece& piece : fake_->layout_.of_shard(shard_)) {
      const TensorSpec& spec = fake_->layout_.tensor(piece.tensor());
      const int64_t size = ElementSize(spec.dtype());
      const int64_t end = piece.begin() + piece.count();
      for (int64_t at = piece.begin(); at < end; at += kChunkElements) {
        const int64_t count = std::min(kChunkElements, end - at);
        TensorFrame& frame = chunks.emplace_back();
        TensorChunk* chunk = frame.mutable_header()->mutable_chunk();
        chunk->set_tensor(piece.tensor());
        chunk->set_begin(at);
        chunk->set_count(count);
        chunk->set_dtype(spec.dtype());
        frame.set_payload(cut[piece.tensor()].substr(at * size, count * size));
        bytes += count * size;
      }
    }
    PullBegin* begin = frames_.emplace_back().mutable_header()->mutable_pull_begin();
    begin->mutable_version()->set_generation(generation);
    begin->mutable_version()->set_step(step);
    begin->set_chunks(chunks.size());
    frames_.insert(frames_.end(), chunks.begin(), chunks.end());
    frames_.emplace_back().mutable_header()->mutable_pull_end()->set_bytes(bytes);
  }

  void WriteNext() {
    if (next_ == frames_.size()) {
      call_->Finish(absl::OkStatus());
    } else {
      call_->Write(ToBuffer(frames_[next_++]));
    }
  }

  FakeShards* const fake_;
  const int shard_;
  std::shared_ptr<BulkCall> call_;
  std::vector<TensorFrame> frames_;
  size_t next_ = 0;
};

class FakeShards::PushHandler : public BulkHandler {
 public:
  PushHandler(FakeShards* fake, int shard) : fake_(fake), shard_(shard) {}

  void OnStart(std::shared_ptr<BulkCall> call) override {
    call_ = std::move(call);
    call_->Read();
  }
  void OnMessage(grpc::ByteBuffer message) override {
    push_.bytes += message.Length();
    const auto frame = FromBuffer<TensorFrame>(&message);
    push_.largest_payload =
        std::max(push_.largest_payload, static_cast<int64_t>(frame.payload().size()));
    const FrameHeader& header = frame.header();
    if (header.has_begin()) push_.begin = header.begin();
    size_t at = 0;
    for (int i = -1; header.has_chunk() && i < header.more_size(); ++i) {
      const TensorChunk& chunk = i < 0 ? header.chunk() : header.more(i);
      const size_t size = chunk.count() * ElementSize(chunk.dtype());
      const std::string payload = frame.payload().substr(at, size);
      at += size;
      if (chunk.content() == TensorChunk::GRADIENT) {
        push_.gradients[chunk.tensor()][chunk.begin()] = payload;
      } else if (chunk.content() == TensorChunk::VALUE) {
        push_.values[chunk.tensor()][chunk.begin()] = payload;
      } else {
        push_.worker_state += payload;
      }
    }
    if (header.has_end()) {
      push_.end = header.end();
      push_.ended = true;
    }
    MutexLock lock(&fake_->mu_);
    std::unique_ptr<Answer> answer;
    if (fake_->on_push_frame_ != nullptr) {
      answer = fake_->on_push_frame_(shard_, frame, push_);
    } else if (header.has_end()) {
      answer = std::make_unique<Answer>();
      answer->reply.set_outcome(APPLIED);
      answer->reply.set_step(push_.begin.step());
    }
    if (answer == nullptr) {
      call_->Read();
      return;
    }
    fake_->pushes_[shard_].push_back(push_);
    answered_ = true;
    if (answer->status.ok()) {
      call_->FinishWith(ToBuffer(answer->reply));
    } else {
      call_->Finish(answer->status);
    }
  }
  void OnHalfClose() override {}
  void OnWritten() override {}
  void OnDone(bool) override {
    MutexLock lock(&fake_->mu_);
    if (!answered_) ++fake_->cancelled_pushes_;
  }

 private:
  FakeShards* const fake_;
  const int shard_;
  std::shared_ptr<BulkCall> call_;
  Push push_;
  bool answered_ = false;
};

FakeShards::FakeShards(const ShardMap& map, bool shared_memory)
    : layout_(*ShardLayout::Create(map)) {
  pushes_.resize(map.num_shards());
  for (int shard = 0; shard < map.num_shards(); ++shard) {
    auto server = std::make_unique<Server>();
    server->bulk.RegisterMethod("/codistill.TensorTransfer/Pull", [this, shard] {
      return std::make_unique<PullHandler>(this, shard);
    });
    server->bulk.RegisterMethod("/codistill.TensorTransfer/Push", [this, shard] {
      return std::make_unique<PushHandler>(this, shard);
    });
    if (shared_memory) server->bulk.ServeSharedMemory();
    RpcServer::Options options;
    options.bulk = &server->bulk;
    auto rpc = RpcServer::Start(options);
    if (!rpc.ok()) {
      ADD_FAILURE() << rpc.status();
      std::abort();
    }
    server->rpc = *std::move(rpc);
    addresses_.push_back(server->rpc->address());
    servers_.push_back(std::move(server));
  }
}

FakeShards::~FakeShards() {
  for (const auto& server : servers_) server->rpc.reset();
}

void FakeShards::Put(uint64_t generation, int64_t step, Cut cut) {
  MutexLock lock(&mu_);
  cuts_[{generation, step}] = std::move(cut);
}

void FakeShards::Remove(uint64_t generation, int64_t step) {
  MutexLock lock(&mu_);
  cuts_.erase({generation, step});
}

int FakeShards::pulls() const {
  MutexLock lock(&mu_);
  return pulls_;
}

void FakeShards::set_pull_filter(FrameFilter filter) {
  MutexLock lock(&mu_);
  filter_ = std::move(filter);
}

void FakeShards::set_hang(bool hang) {
  MutexLock lock(&mu_);
  hang_ = hang;
}

std::vector<FakeShards::Push> FakeShards::pushes(int shard) const {
  MutexLock lock(&mu_);
  return pushes_[shard];
}

void FakeShards::set_on_push_frame(OnPushFrame on_push_frame) {
  MutexLock lock(&mu_);
  on_push_frame_ = std::move(on_push_frame);
}

int FakeShards::cancelled_pushes() const {
  MutexLock lock(&mu_);
  return cancelled_pushes_;
}

}  // namespace codistill
