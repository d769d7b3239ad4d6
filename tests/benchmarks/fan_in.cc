// Many small pushes from many connections: one shard of an ASYNC group, 1,000 ranks, each with a
// TCP connection of its own, each pushing again as soon as its last push is answered. Every push is
// applied: at the end the shard's step is the number of pushes, and its weights are what so many
// gradients make of the initial ones.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/deadlock_detection.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/rpc/grpc_status.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/server_group.h"

ABSL_FLAG(bool, quick, false, "Shorter rounds, for a first look.");
ABSL_FLAG(int, connections, 1000, "Ranks, each with a connection of its own.");

namespace codistill {
namespace {

constexpr int kServerCore = 0;
constexpr int kClientCore = 1;
constexpr int kPayload = TensorFrame::kPayloadFieldNumber;
constexpr float kRate = 1.0f / (1 << 20);
// Two small tensors, 8 KiB in all.
constexpr int64_t kSizes[] = {1024, 1024};

void Check(const absl::Status& status, const std::string& what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what.c_str(), status.ToString().c_str());
  std::exit(1);
}

template <typename T>
T CheckValue(absl::StatusOr<T> value, const std::string& what) {
  Check(value.status(), what);
  return *std::move(value);
}

double ResidentKib(pid_t pid) {
  std::ifstream statm(absl::StrCat("/proc/", pid, "/statm"));
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return static_cast<double>(resident) * static_cast<double>(sysconf(_SC_PAGESIZE)) / 1024;
}

// What all ranks push: 1 everywhere.
class Payload {
 public:
  explicit Payload(const RegisterReply& registered) : registered_(registered) {
    int64_t elements = 0;
    for (int64_t size : kSizes) elements += size;
    ones_ = std::make_shared<std::vector<float>>(elements, 1.0f);
  }

  grpc::ByteBuffer Begin(const GroupRef& group, int rank, int64_t step) const {
    TensorFrame frame;
    PushBegin* const begin = frame.mutable_header()->mutable_begin();
    *begin->mutable_group() = group;
    begin->set_generation(registered_.generation());
    begin->set_step(step);
    begin->set_rank(rank);
    begin->set_incarnation(1);
    begin->set_shard_map_digest(registered_.shard_map_digest());
    return EncodeWithPayload(frame, kPayload, {});
  }

  grpc::ByteBuffer Chunks() const {
    TensorFrame frame;
    FrameHeader* const header = frame.mutable_header();
    for (int i = 0; i < registered_.shard_map().tensors_size(); ++i) {
      TensorChunk* const chunk = i == 0 ? header->mutable_chunk() : header->add_more();
      chunk->set_tensor(i);
      chunk->set_count(registered_.shard_map().tensors(i).shape(0));
      chunk->set_dtype(DT_FLOAT);
      chunk->set_content(TensorChunk::GRADIENT);
    }
    const PayloadRef part = {ones_->data(), ones_->size() * sizeof(float), ones_};
    return EncodeWithParts(frame, kPayload, absl::MakeConstSpan(&part, 1));
  }

  grpc::ByteBuffer End() const {
    TensorFrame frame;
    PushEnd* const end = frame.mutable_header()->mutable_end();
    end->set_num_examples(1);
    end->set_squared_norm(static_cast<double>(ones_->size()));
    end->set_finite(true);
    return EncodeWithPayload(frame, kPayload, {});
  }

 private:
  const RegisterReply registered_;
  std::shared_ptr<std::vector<float>> ones_;
};

// One rank: pushes over and over, an operation at a time, driven by the completion queue.
class Pusher {
 public:
  Pusher(const std::string& address, const GroupRef& group, const Payload* payload, int rank)
      : group_(group),
        payload_(payload),
        rank_(rank),
        channel_(MakeChannel(address, ChannelUse::kBulk)) {}

  void Start(grpc::CompletionQueue* queue) {
    ++step_;
    started_ = absl::Now();
    context_ = MakeContext(started_ + absl::Seconds(30));
    context_->set_initial_metadata_corked(true);
    grpc::GenericStub stub(channel_);
    stream_ = stub.PrepareCall(context_.get(), "/codistill.TensorTransfer/Push", queue);
    stream_->StartCall(this);
    state_ = kBegin;
    // The three messages leave together.
    stream_->Write(payload_->Begin(group_, rank_, step_), grpc::WriteOptions().set_buffer_hint(),
                   this);
  }

  // An operation has ended. True: the push is over.
  bool Advance(bool ok) {
    if (!ok && state_ != kFinish) {
      state_ = kFinish;
      stream_->Finish(&status_, this);
      return false;
    }
    switch (state_) {
      case kBegin:
        state_ = kChunks;
        stream_->Write(payload_->Chunks(), grpc::WriteOptions().set_buffer_hint(), this);
        return false;
      case kChunks:
        state_ = kEnd;
        stream_->Write(payload_->End(), grpc::WriteOptions(), this);
        return false;
      case kEnd:
        state_ = kReply;
        reply_.Clear();
        stream_->Read(&reply_, this);
        return false;
      case kReply:
        state_ = kFinish;
        stream_->Finish(&status_, this);
        return false;
      case kFinish:
        break;
    }
    stream_.reset();
    return true;
  }

  // Of the push that is over: applied, or why not.
  absl::Status Outcome() {
    if (!status_.ok()) return FromGrpcStatus(status_);
    PushReply reply;
    DecodedPayload none;
    const absl::Status decoded = DecodedPayload::Decode(&reply_, kPayload, &reply, &none);
    if (!decoded.ok()) return decoded;
    if (reply.outcome() != APPLIED) {
      return absl::InternalError(
          absl::StrCat(PushOutcome_Name(reply.outcome()), ": ", reply.message()));
    }
    return absl::OkStatus();
  }
  double Milliseconds() const { return absl::ToDoubleMilliseconds(absl::Now() - started_); }

 private:
  enum State { kBegin, kChunks, kEnd, kReply, kFinish };

  const GroupRef group_;
  const Payload* const payload_;
  const int rank_;
  const std::shared_ptr<grpc::Channel> channel_;
  int64_t step_ = 0;
  State state_ = kBegin;
  absl::Time started_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  grpc::ByteBuffer reply_;
  grpc::Status status_;
};

// What all pushers did between two moments.
struct Round {
  int64_t calls = 0;
  int64_t failed = 0;
  std::vector<double> latencies_ms;
  double seconds = 0;
};

// Every pusher pushes again and again for `duration`; returns when all are answered.
Round RunRound(std::vector<std::unique_ptr<Pusher>>* pushers, grpc::CompletionQueue* queue,
               absl::Duration duration) {
  Round round;
  const absl::Time begin = absl::Now(), end = begin + duration;
  for (const auto& pusher : *pushers) pusher->Start(queue);
  for (size_t open = pushers->size(); open > 0;) {
    void* tag = nullptr;
    bool ok = false;
    if (!queue->Next(&tag, &ok)) break;
    auto* const pusher = static_cast<Pusher*>(tag);
    if (!pusher->Advance(ok)) continue;
    ++round.calls;
    round.latencies_ms.push_back(pusher->Milliseconds());
    if (const absl::Status outcome = pusher->Outcome(); !outcome.ok()) {
      if (++round.failed <= 3) std::fprintf(stderr, "a push: %s\n", outcome.ToString().c_str());
    }
    if (absl::Now() < end) {
      pusher->Start(queue);
    } else {
      --open;
    }
  }
  round.seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  return round;
}

int RunBenchmark() {
  const bool quick = absl::GetFlag(FLAGS_quick);
  const int connections = absl::GetFlag(FLAGS_connections);
  const int rounds = quick ? 3 : 10;
  const absl::Duration duration = absl::Seconds(quick ? 1 : 3);
  Check(PinToCore(kClientCore), "pinning");
  const char* const tmp = std::getenv("TEST_TMPDIR");
  const std::string directory = JoinPath(tmp == nullptr ? "/tmp" : tmp, "fan_in");
  Check(ServerGroup::WriteModel(std::vector<int64_t>(std::begin(kSizes), std::end(kSizes)),
                                directory),
        "model");
  ServerGroup::Options options;
  options.name = "fan_in";
  options.directory = directory;
  options.training.set_update_mode(TrainingConfig::ASYNC);
  options.training.mutable_optimizer()->set_kind(OptimizerConfig::SGD);
  options.training.mutable_optimizer()->set_learning_rate(kRate);
  options.training.set_publish_every_steps(1000000);
  options.num_workers = connections;
  options.server_core = kServerCore;
  options.client_core = kClientCore;
  const auto group = CheckValue(ServerGroup::Start(options), "servers");
  GroupWorker worker = CheckValue(group->Join(0), "joining");
  const Payload payload(worker.registered);

  grpc::CompletionQueue queue;
  std::vector<std::unique_ptr<Pusher>> pushers;
  const auto add = [&] {
    pushers.push_back(std::make_unique<Pusher>(group->address(0), group->ref(), &payload,
                                               static_cast<int>(pushers.size())));
  };
  add();
  int64_t applied = 0;
  const auto count = [&](const Round& round) { applied += round.calls - round.failed; };
  count(RunRound(&pushers, &queue, absl::Milliseconds(500)));  // the server's own start-up
  const double kib_before = ResidentKib(group->pid(0));
  while (static_cast<int>(pushers.size()) < connections) add();
  count(RunRound(&pushers, &queue, duration));  // connects all

  int64_t failed = 0, calls = 0;
  std::vector<double> rates, p99s, p50s, kib;
  for (int r = 0; r < rounds; ++r) {
    const Round round = RunRound(&pushers, &queue, duration);
    count(round);
    calls += round.calls;
    failed += round.failed;
    rates.push_back(static_cast<double>(round.calls) / round.seconds);
    p50s.push_back(Percentile(round.latencies_ms, 0.5));
    p99s.push_back(Percentile(round.latencies_ms, 0.99));
    kib.push_back(ResidentKib(group->pid(0)));
  }
  const double kib_after = *std::max_element(kib.begin(), kib.end());

  // Every push that was answered APPLIED is in the weights, once.
  PrefaultedArray weights(kSizes[0] + kSizes[1]);
  const std::vector<TensorView> views = ViewsOf(worker.registered.shard_map(), weights.span());
  const auto pulled = CheckValue(
      worker.tensors->Pull(TensorClient::Source::kAtLeastStep, worker.registered.generation(),
                           applied, views, absl::Now() + absl::Seconds(20)),
      "pulling the result");
  if (pulled.version.shard_steps_size() != 1 || pulled.version.shard_steps(0) != applied) {
    Check(absl::DataLossError(absl::StrCat("the shard has taken ", pulled.version.shard_steps(0),
                                           " steps for ", applied, " pushes answered APPLIED")),
          "steps");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    // The rate is a power of two, so that a step is exact but where the exponent changes.
    const double want = ServerGroup::InitialWeight(static_cast<int64_t>(i)) -
                        static_cast<double>(kRate) * static_cast<double>(applied);
    if (!(std::fabs(weights.data()[i] - want) <= kRate / 4)) {
      Check(absl::DataLossError(
                absl::StrCat("element ", i, " is ", weights.data()[i], ", must be ", want)),
            "weights");
    }
  }

  nlohmann::ordered_json report =
      NewReport("fan_in", rounds, "server on core 0, clients on core 1");
  report["connections"] = connections;
  report["bytes_a_push"] = 4 * (kSizes[0] + kSizes[1]);
  report["seconds_a_round"] = absl::ToDoubleSeconds(duration);
  report["calls"] = calls;
  report["failed_calls"] = failed;
  report["calls_per_s"] = Median(rates);
  report["p50_ms"] = Median(p50s);
  report["p99_ms"] = Median(p99s);
  report["worst_p99_ms"] = *std::max_element(p99s.begin(), p99s.end());
  report["kib_per_connection"] = (kib_after - kib_before) / connections;
  report["server_kib"] = kib_after;
  PrintReport(report);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::DisableDeadlockDetection();
  absl::ParseCommandLine(argc, argv);
  return codistill::RunBenchmark();
}
