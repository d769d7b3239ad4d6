// Frames as a shard receives them: an input is a call (push or pull) and its messages, fed to the
// handlers of the transfer service around a real shard. No leader ever decides, so whatever came,
// the shard is at step 0 afterwards and its cut has the weights it was loaded with.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/config/job.h"
#include "common/config/shard_map.h"
#include "common/rpc/bulk_server.h"
#include "glog/logging.h"
#include "grpcpp/support/byte_buffer.h"
#include "proto/parameter_server.pb.h"
#include "server/shard.h"
#include "server/test_model.h"
#include "server/transfer_service.h"
#include "tests/fuzz/fuzz_target.h"

namespace codistill {
namespace {

constexpr uint64_t kGeneration = 1;

class SilentLeader final : public EndReporter {
 public:
  void SetLeader(const std::string&) override {}
  void ReportEnd(ReportEndRequest, std::function<void(absl::Status)> done) override {
    done(absl::OkStatus());
  }
};

// What a call would do on a network; its answers go nowhere.
class DeafCall final : public BulkCall {
 public:
  void Read() override { reading = true; }
  void Write(grpc::ByteBuffer message) override {
    CHECK(message.Valid());
    writing = true;
  }
  void Finish(absl::Status) override { finished = true; }
  void FinishWith(grpc::ByteBuffer) override { finished = true; }
  void Post(std::function<void()> f) override { posted.push_back(std::move(f)); }
  std::string peer() const override { return "fuzz"; }

  bool reading = false;
  bool writing = false;
  bool finished = false;
  std::vector<std::function<void()>> posted;
};

struct World {
  SilentLeader leader;
  std::unique_ptr<ModelShard> shard;
  std::unique_ptr<TransferService> service;
  GroupRef group;
  uint64_t digest = 0;
};

World* MakeWorld() {
  auto* const world = new World;
  const char* const root = std::getenv("TEST_TMPDIR");
  const std::string directory = JoinPath(root == nullptr ? "/tmp" : root, "fuzz-model");
  CHECK(FileSystem::Real()->MakeDirs(directory).ok());
  CHECK(WriteTestModel(directory));
  ModelShard::Options options;
  options.job = TestJob(directory, 1, 2);
  options.map = BuildShardMap(TestTensors(), 1).value();
  options.map_digest = ShardMapDigest(options.map);
  options.process_nonce = 5;
  options.reporter = &world->leader;
  world->digest = options.map_digest;
  world->group.set_run_id(RunId(options.job));
  world->group.set_group("alpha");
  world->shard = ModelShard::Create(options).value();
  world->service = std::make_unique<TransferService>(world->shard.get(), world->group);
  RestoreRequest restore;
  *restore.mutable_group() = world->group;
  restore.set_generation(kGeneration);
  restore.set_leader_nonce(1);
  restore.set_shard_map_digest(world->digest);
  Mutex mu;
  bool loaded = false;
  world->shard->Restore(restore, [&](absl::StatusOr<RestoreReply> reply) {
    CHECK(reply.ok()) << reply.status();
    MutexLock lock(&mu);
    loaded = true;
  });
  MutexLock lock(&mu);
  mu.Await(absl::Condition(&loaded));
  return world;
}

World& TheWorld() {
  static World* const world = MakeWorld();
  return *world;
}

void AddMessage(const std::string& message, std::string* input) {
  *input += static_cast<char>(message.size() & 0xff);
  *input += static_cast<char>(message.size() >> 8);
  *input += message;
}

PushBegin Begin(int rank) {
  PushBegin begin;
  *begin.mutable_group() = TheWorld().group;
  begin.set_generation(kGeneration);
  begin.set_step(1);
  begin.set_rank(rank);
  begin.set_incarnation(1);
  begin.set_shard_map_digest(TheWorld().digest);
  return begin;
}

std::string Push(bool end) {
  std::string input(1, 0);
  TensorFrame frame;
  *frame.mutable_header()->mutable_begin() = Begin(0);
  AddMessage(frame.SerializeAsString(), &input);
  const TensorList tensors = TestTensors();
  for (int i = 0; i < tensors.tensors_size(); ++i) {
    const TensorSpec& spec = tensors.tensors(i);
    if (spec.role() != TensorSpec::PARAMETER && spec.role() != TensorSpec::BUFFER) continue;
    int64_t count = 1;
    for (int64_t size : spec.shape()) count *= size;
    count = std::min<int64_t>(count, 128);
    TensorFrame chunk;
    TensorChunk* const header = chunk.mutable_header()->mutable_chunk();
    header->set_tensor(i);
    header->set_count(count);
    header->set_dtype(spec.dtype());
    header->set_content(spec.role() == TensorSpec::PARAMETER ? TensorChunk::GRADIENT
                                                             : TensorChunk::VALUE);
    chunk.set_payload(std::string(count * (spec.dtype() == DT_INT64 ? 8 : 4), '\1'));
    AddMessage(chunk.SerializeAsString(), &input);
  }
  if (end) {
    TensorFrame last;
    last.mutable_header()->mutable_end()->set_num_examples(4);
    last.mutable_header()->mutable_end()->set_finite(false);
    AddMessage(last.SerializeAsString(), &input);
  }
  return input;
}

std::string Pull(const std::function<void(PullRequest*)>& source) {
  std::string input(1, 1);
  PullRequest request;
  *request.mutable_group() = TheWorld().group;
  request.set_generation(kGeneration);
  request.set_shard_map_digest(TheWorld().digest);
  source(&request);
  AddMessage(request.SerializeAsString(), &input);
  return input;
}

void CheckNothingChanged() {
  const ShardStore& store = TheWorld().shard->store();
  CHECK_EQ(TheWorld().shard->state().step, 0);
  CHECK_EQ(store.step(), 0);
  const auto cut = store.FindCut(0);
  CHECK(cut != nullptr);
  for (size_t i = 0; i < store.layout().pieces().size(); ++i) {
    const ShardPiece& piece = store.layout().pieces()[i];
    if (piece.role != TensorSpec::PARAMETER) continue;
    std::vector<float> values(static_cast<size_t>(piece.piece.count()));
    CHECK(store
              .ReadElements(*cut, static_cast<int>(i), piece.piece.begin(), piece.piece.count(),
                            values.data())
              .ok());
    for (size_t k = 0; k < values.size(); ++k) {
      CHECK_EQ(values[k], TestValue(piece.name, piece.piece.begin() + static_cast<int64_t>(k)));
    }
  }
}

// As received bytes lie: in slices whose borders mean nothing.
grpc::ByteBuffer Slices(absl::string_view bytes, uint8_t how) {
  std::vector<grpc::Slice> slices;
  const size_t step = how % 3 == 0 ? bytes.size() : how % 3 == 1 ? 7 : 64;
  for (size_t at = 0; at < bytes.size(); at += std::max<size_t>(step, 1)) {
    const absl::string_view part = bytes.substr(at, std::max<size_t>(step, 1));
    slices.emplace_back(part.data(), part.size());
  }
  if (slices.empty()) slices.emplace_back();
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  return {Push(true), Push(false), Pull([](PullRequest* request) { request->set_cut_step(0); }),
          Pull([](PullRequest* request) {
            request->set_step(0);
            request->add_tensors(1);
          }),
          Pull([](PullRequest* request) { request->set_at_least_step(0); })};
}

void FuzzOne(absl::string_view input) {
  if (input.empty()) return;
  const uint8_t first = static_cast<uint8_t>(input[0]);
  input.remove_prefix(1);
  TransferService* const service = TheWorld().service.get();
  const std::unique_ptr<BulkHandler> handler =
      first % 2 == 0 ? service->NewPushHandler() : service->NewPullHandler();
  auto call = std::make_shared<DeafCall>();
  handler->OnStart(call);
  while (input.size() >= 2 && call->reading && !call->finished) {
    const size_t length = static_cast<uint8_t>(input[0]) | static_cast<uint8_t>(input[1]) << 8;
    input.remove_prefix(2);
    call->reading = false;
    handler->OnMessage(Slices(input.substr(0, length), first / 2));
    input.remove_prefix(std::min(length, input.size()));
  }
  for (int i = 0; i < 64 && !call->finished && (!call->posted.empty() || call->writing); ++i) {
    std::vector<std::function<void()>> posted;
    posted.swap(call->posted);
    for (const auto& f : posted) f();
    if (call->writing) {
      call->writing = false;
      handler->OnWritten();
    }
  }
  if (!call->finished) handler->OnHalfClose();
  handler->OnDone(true);
  CheckNothingChanged();
}

}  // namespace codistill
