#include "server/parameter_server.h"

#include <unistd.h>

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "common/config/parameter_groups.h"
#include "common/config/shard_map.h"
#include "common/rpc/bulk_channel.h"
#include "glog/logging.h"
#include "server/drain_times.h"

namespace codistill {
namespace {

constexpr int kBulkThreads = 2;
constexpr absl::Duration kLeaderTick = absl::Milliseconds(20);
constexpr absl::Duration kShardClaimCheck = absl::Milliseconds(500);
constexpr absl::Duration kShardTick = absl::Milliseconds(100);
constexpr absl::Duration kCheckpointWait = absl::Minutes(10);
// How a shard that is told to drain recognises that its leader has finished with it.
constexpr absl::Duration kLeaderSilence = absl::Seconds(2);

uint64_t Nonce() {
  std::random_device random;
  const uint64_t nonce = (uint64_t{random()} << 32) | random();
  return nonce == 0 ? 1 : nonce;
}

// A kernel-chosen port in the job says nothing.
bool Known(const std::string& address) {
  return !address.empty() && !absl::EndsWith(address, ":0");
}

// Brings counters up to `counts`.
void MirrorPushes(Metrics* metrics, const char* name, const char* help, int32_t rank,
                  const PushCounts& counts) {
  const std::pair<const char*, int64_t> outcomes[] = {
      {"applied", counts.applied()},     {"dropped_late", counts.dropped_late()},
      {"too_stale", counts.too_stale()}, {"rejected", counts.rejected()},
      {"duplicate", counts.duplicate()}, {"refused", counts.refused()},
      {"lost", counts.lost()},
  };
  for (const auto& [outcome, value] : outcomes) {
    if (value == 0) continue;
    Metrics::Counter* const counter =
        metrics->counter(name, help, {{"rank", absl::StrCat(rank)}, {"outcome", outcome}});
    counter->Add(std::max(0.0, static_cast<double>(value) - counter->value()));
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<ParameterServer>> ParameterServer::Create(Options options) {
  std::unique_ptr<ParameterServer> server(new ParameterServer(std::move(options)));
  CODISTILL_RETURN_IF_ERROR(server->Init());
  return server;
}

ParameterServer::ParameterServer(Options options)
    : options_(std::move(options)), bulk_(kBulkThreads) {}

absl::Status ParameterServer::Init() {
  const JobConfig& job = options_.job;
  const GroupConfig& group = job.groups(options_.group);
  group_.set_run_id(RunId(job));
  group_.set_group(group.name());
  const int num_shards = group.num_shards();
  if (options_.shard < 0 || options_.shard >= num_shards) {
    return absl::InvalidArgumentError(absl::StrCat("--shard=", options_.shard, ": group ",
                                                   group.name(), " has ", num_shards, " shards"));
  }
  CODISTILL_ASSIGN_OR_RETURN(const TensorList tensors,
                             LoadTensorList(TensorListPath(job, options_.group)));
  CODISTILL_ASSIGN_OR_RETURN(ShardMap map, BuildShardMap(tensors, num_shards));
  CODISTILL_RETURN_IF_ERROR(MarkFrozen(job.training().optimizer(), &map));
  const uint64_t digest = ShardMapDigest(map);

  ModelShard::Options shard;
  shard.job = job;
  shard.group = options_.group;
  shard.shard = options_.shard;
  shard.map = map;
  shard.map_digest = digest;
  shard.process_nonce = Nonce();
  shard.file_system = options_.file_system;
  if (options_.shard == 0) {
    local_reporter_ = std::make_unique<LocalEndReporter>();
    shard.reporter = local_reporter_.get();
  } else {
    grpc_reporter_ = MakeGrpcEndReporter();
    shard.reporter = grpc_reporter_.get();
  }
  if (options_.metrics != nullptr) {
    Metrics::Histogram* const latency = options_.metrics->latency(
        "codistill_server_update_seconds", "Time one update of this shard's weights took.");
    shard.on_commit = [latency](double seconds) { latency->Observe(seconds); };
  }
  CODISTILL_ASSIGN_OR_RETURN(shard_, ModelShard::Create(std::move(shard)));
  transfer_ = std::make_unique<TransferService>(shard_.get(), group_);
  transfer_->RegisterMethods(&bulk_);
  follow_ = std::make_unique<FollowService>(shard_.get(), group_);
  follow_->RegisterMethods(&bulk_);
  if (SharedMemoryAllowed() && job.transport().shared_memory() != TransportConfig::OFF) {
    bulk_.ServeSharedMemory();
  }
  shard_service_ = std::make_unique<ShardService>(shard_.get(), group_);

  if (options_.shard == 0) {
    GroupLeader::Options leader;
    leader.job = job;
    leader.group = options_.group;
    leader.map = map;
    leader.map_digest = digest;
    leader.nonce = Nonce();
    leader.file_system = options_.file_system;
    leader.on_superseded = options_.on_superseded;
    links_.push_back(MakeLocalShardLink(shard_.get()));
    for (int s = 1; s < num_shards; ++s) {
      const std::string address = s < group.shards_size() ? group.shards(s).address() : "";
      if (!Known(address)) {
        return absl::InvalidArgumentError(
            absl::StrCat("groups[", options_.group, "].shards[", s, "].address: is ",
                         address.empty() ? "empty" : address, "; the leader of group ",
                         group.name(), " must know it"));
      }
      links_.push_back(MakeGrpcShardLink(address));
    }
    for (const auto& link : links_) leader.links.push_back(link.get());
    CODISTILL_ASSIGN_OR_RETURN(leader_, GroupLeader::Create(std::move(leader)));
    local_reporter_->set_leader(leader_.get());
    leader_service_ = std::make_unique<LeaderService>(leader_.get(), group_);
  }
  if (options_.metrics != nullptr) RegisterMetrics();
  return absl::OkStatus();
}

ParameterServer::~ParameterServer() {
  leader_ticks_.reset();
  shard_ticks_.reset();
  claim_ticks_.reset();
  // Each side of every callback ends before the other is destroyed.
  if (leader_ != nullptr) leader_->Stop();
  links_.clear();
  if (shard_ != nullptr) shard_->Drain();
  if (grpc_reporter_ != nullptr) grpc_reporter_->Stop();
  shard_.reset();
}

std::vector<grpc::Service*> ParameterServer::services() {
  std::vector<grpc::Service*> services = {shard_service_.get()};
  if (leader_service_ != nullptr) services.push_back(leader_service_.get());
  return services;
}

std::vector<CallRegistry*> ParameterServer::registries() {
  std::vector<CallRegistry*> registries = {shard_service_->registry()};
  if (leader_service_ != nullptr) registries.push_back(leader_service_->registry());
  return registries;
}

void ParameterServer::Start(const std::string& address) {
  PeriodicTask::Options shard_ticks;
  shard_ticks.name = "shard-tick";
  shard_ticks.interval = kShardTick;
  shard_ticks_ = std::make_unique<PeriodicTask>(shard_ticks, [this] { shard_->Tick(); });
  if (leader_ == nullptr) {
    const std::string directory = CheckpointDirectory(options_.job, options_.group);
    if (!directory.empty()) {
      PeriodicTask::Options claim_ticks;
      claim_ticks.name = "shard-claim";
      claim_ticks.interval = kShardClaimCheck;
      claim_ticks.run_immediately = true;
      claim_ticks_ = std::make_unique<PeriodicTask>(claim_ticks, [this] { CheckShardClaim(); });
    }
    return;
  }

  const GroupConfig& group = options_.job.groups(options_.group);
  std::vector<std::string> addresses;
  for (int s = 0; s < group.num_shards(); ++s) {
    const std::string of_job = s < group.shards_size() ? group.shards(s).address() : "";
    addresses.push_back(s == 0 && !Known(of_job) ? address : of_job);
  }
  leader_->SetAddresses(addresses[0], addresses);
  PeriodicTask::Options leader_ticks;
  leader_ticks.name = "leader-tick";
  leader_ticks.interval = kLeaderTick;
  leader_ticks.run_immediately = true;
  leader_ticks_ = std::make_unique<PeriodicTask>(leader_ticks, [this] { leader_->Tick(); });
}

void ParameterServer::CheckShardClaim() {
  if (superseded_) return;
  absl::Status status;
  if (shard_claim_ == nullptr) {
    const std::string directory = CheckpointDirectory(options_.job, options_.group);
    status = options_.file_system->MakeDirs(directory);
    if (status.ok()) {
      absl::StatusOr<std::unique_ptr<DirectoryClaim>> claim =
          DirectoryClaim::Take(directory, absl::StrCat("SHARD-", options_.shard, "-CLAIM"),
                               ClaimOwner(), options_.file_system);
      status = claim.status();
      if (claim.ok()) shard_claim_ = *std::move(claim);
    }
    // The checkpoint that cannot be written there will say so.
    LOG_IF_EVERY_N(WARNING, !status.ok(), 100)
        << "shard " << options_.shard << " cannot claim its index: " << status;
    return;
  }
  status = shard_claim_->Check();
  if (!absl::IsFailedPrecondition(status)) return;
  superseded_ = true;
  status = absl::FailedPreconditionError(absl::StrCat("shard ", options_.shard, " of group ",
                                                      group_.group(), " ends: ", status.message()));
  LOG(ERROR) << status.message();
  shard_->Drain();
  if (options_.on_superseded) options_.on_superseded(status);
}

absl::Status ParameterServer::Drain() {
  absl::Status status;
  if (leader_ != nullptr) {
    // Shared: whoever is late still has it.
    struct Result {
      absl::Notification done;
      absl::Status status;
    };
    auto result = std::make_shared<Result>();
    leader_->Drain([result](absl::Status drained) {
      result->status = std::move(drained);
      result->done.Notify();
    });
    if (result->done.WaitForNotificationWithTimeout(absl::Seconds(30))) {
      status = result->status;
    } else {
      status = absl::DeadlineExceededError("the group's work did not end in time");
    }
  } else {
    // The leader is told to drain too, and wants this shard's part of its last checkpoint.
    const absl::Time begin = absl::Now();
    while (absl::Now() - shard_->last_leader_call() < kLeaderSilence &&
           absl::Now() - begin < kDrainShard) {
      absl::SleepFor(absl::Milliseconds(50));
    }
  }
  shard_->Drain();
  return status;
}

absl::StatusOr<CheckpointReply> ParameterServer::Checkpoint() {
  struct Result {
    absl::Notification done;
    absl::StatusOr<CheckpointReply> reply;
  };
  auto result = std::make_shared<Result>();
  leader_->Checkpoint([result](absl::StatusOr<CheckpointReply> reply) {
    result->reply = std::move(reply);
    result->done.Notify();
  });
  if (!result->done.WaitForNotificationWithTimeout(kCheckpointWait)) {
    return absl::DeadlineExceededError("the checkpoint was not written in time");
  }
  return result->reply;
}

void ParameterServer::FillStatus(DaemonStatus* status) const {
  if (leader_ != nullptr) {
    leader_->FillStatus(status);
    return;
  }
  const ModelShard::State state = shard_->state();
  status->set_state(state.loading ? "restoring" : state.generation == 0 ? "waiting" : "serving");
  status->set_detail(state.generation == 0
                         ? "waiting for the leader"
                         : absl::StrCat(shard_->store().values_bytes(), " bytes of weights, ",
                                        shard_->counters().parked_calls, " calls wait"));
  status->set_step(state.step);
  status->set_generation(state.generation);
  status->set_rate_unit("steps/s");
  *status->add_shards() = shard_->load();
}

void ParameterServer::RegisterMetrics() {
  Metrics* const metrics = options_.metrics;
  struct Mirrored {
    Metrics::Counter* counter;
    std::function<double()> value;
  };
  auto counters = std::make_shared<std::vector<Mirrored>>();
  const auto mirror = [&](const char* name, const char* help, std::function<double()> value) {
    counters->push_back({metrics->counter(name, help), std::move(value)});
  };
  ModelShard* const shard = shard_.get();
  mirror("codistill_server_steps_committed_total", "Updates of this shard.",
         [shard] { return static_cast<double>(shard->counters().commits); });
  mirror("codistill_server_pushes_total", "Pushes that ended, whatever they were answered.",
         [shard] { return static_cast<double>(shard->counters().pushes); });
  mirror("codistill_server_pulls_total", "Pulls answered with weights.",
         [shard] { return static_cast<double>(shard->counters().pulls); });
  mirror("codistill_server_push_bytes_total", "Bytes received in pushes.",
         [this] { return static_cast<double>(transfer_->push_bytes()); });
  mirror("codistill_server_pull_bytes_total", "Bytes sent in pulls.",
         [this] { return static_cast<double>(transfer_->pull_bytes()); });
  mirror("codistill_server_follow_bytes_total", "Bytes of embedding tables sent to followers.",
         [this] { return static_cast<double>(follow_->bytes()); });
  mirror("codistill_server_pushes_rejected_total", "Pushes answered REJECTED.",
         [shard] { return static_cast<double>(shard->counters().rejected); });
  mirror("codistill_server_checkpoints_total", "Checkpoint files written.",
         [shard] { return static_cast<double>(shard->counters().checkpoints); });
  mirror("codistill_server_checkpoint_bytes_total", "Bytes of checkpoint files written.",
         [shard] { return static_cast<double>(shard->counters().checkpoint_bytes); });
  mirror("codistill_server_restores_total", "Generations this shard has loaded.",
         [shard] { return static_cast<double>(shard->counters().restores); });
  mirror("codistill_server_failures_total", "Loads and checkpoints that failed, pushes refused.",
         [shard] { return static_cast<double>(shard->counters().failures); });

  struct Shown {
    Metrics::Gauge* gauge;
    std::function<double()> value;
  };
  auto gauges = std::make_shared<std::vector<Shown>>();
  const auto show = [&](const char* name, const char* help, std::function<double()> value) {
    gauges->push_back({metrics->gauge(name, help), std::move(value)});
  };
  show("codistill_server_step", "Newest step of this shard.",
       [shard] { return static_cast<double>(shard->state().step); });
  show("codistill_server_generation", "Generation this shard is in; 0 = nothing loaded.",
       [shard] { return static_cast<double>(shard->state().generation); });
  show("codistill_server_staged_bytes", "Memory of pushes that wait for their step.", [shard] {
    return static_cast<double>(shard->counters().staged_pushes) *
           static_cast<double>(shard->store().values_bytes());
  });
  show("codistill_server_shared_memory_connections",
       "Connections of processes of this host through shared memory.",
       [this] { return static_cast<double>(bulk_.shared_memory_connections()); });
  show("codistill_server_parked_calls", "Pushes and pulls that wait.",
       [shard] { return static_cast<double>(shard->counters().parked_calls); });
  for (int t = 0; t < shard->embeddings()->num_tables(); ++t) {
    const EmbeddingTable* const table = shard->embeddings()->table(t);
    const Metrics::Labels labels = {{"table", table->options().name}};
    const auto show_table = [&](const char* name, const char* help, auto value) {
      gauges->push_back({metrics->gauge(name, help, labels),
                         [table, value] { return static_cast<double>(value(table->stats())); }});
    };
    using Stats = EmbeddingTable::Stats;
    show_table("codistill_embedding_rows", "Rows of this shard's part of a table.",
               [](const Stats& s) { return s.rows; });
    show_table("codistill_embedding_waiting_keys", "Keys that wait for admission.",
               [](const Stats& s) { return s.waiting; });
    show_table("codistill_embedding_bytes", "Memory of a table, slots and index included.",
               [](const Stats& s) { return s.bytes; });
    show_table("codistill_embedding_created_rows", "Rows made since the group was last restored.",
               [](const Stats& s) { return s.total.created; });
    show_table("codistill_embedding_evicted_rows", "Rows evicted since then.",
               [](const Stats& s) { return s.total.evicted; });
    show_table("codistill_embedding_refused_gradients",
               "Gradients dropped since then because the table was full.",
               [](const Stats& s) { return s.total.refused; });
  }
  show("codistill_server_weights_bytes", "Weights and buffers of this shard.",
       [shard] { return static_cast<double>(shard->store().values_bytes()); });
  show("codistill_server_held_bytes",
       "Weights and slots kept beside the live ones: cuts, snapshots and readers of old versions.",
       [shard] { return static_cast<double>(shard->store().memory().held_bytes); });
  show("codistill_server_block_pool_bytes", "Memory of all weights and slots, in use or free.",
       [shard] { return static_cast<double>(shard->store().memory().allocated_bytes); });
  show("codistill_server_held_cuts", "Cuts that followers can load.",
       [shard] { return static_cast<double>(shard->store().memory().cuts); });
  show("codistill_server_old_versions_read",
       "Versions that are no longer held or no longer live, but still being read.", [shard] {
         const ShardStore::Memory memory = shard->store().memory();
         return static_cast<double>(memory.old_cuts + memory.live_reads);
       });
  mirror("codistill_server_reads_revoked_total",
         "Versions taken from readers that were too slow, to bound memory.",
         [shard] { return static_cast<double>(shard->store().memory().revoked); });
  if (leader_ != nullptr) {
    GroupLeader* const leader = leader_.get();
    show("codistill_leader_members", "Workers that take part.",
         [leader] { return static_cast<double>(leader->counters().members); });
    show("codistill_leader_group_step", "Newest step committed by the group.",
         [leader] { return static_cast<double>(leader->State(false).version().step()); });
    show("codistill_leader_newest_cut_step", "Step of the newest published cut.",
         [leader] { return static_cast<double>(leader->State(false).newest_cut().step()); });
    show("codistill_leader_phase", "GroupState.Phase by number.",
         [leader] { return static_cast<double>(leader->State(false).phase()); });
    const auto fate = [&](const char* name, int64_t (AsyncCounters::*field)() const) {
      gauges->push_back(
          {metrics->gauge("codistill_leader_async_pushes",
                          "Steps handed out in ASYNC, by what became of them.", {{"fate", name}}),
           [leader, field] { return static_cast<double>((leader->async_counters().*field)()); }});
    };
    if (options_.job.training().update_mode() != TrainingConfig::SYNC) {
      fate("whole", &AsyncCounters::whole);
      fate("partial", &AsyncCounters::partial);
      fate("lost", &AsyncCounters::lost);
      fate("rejected", &AsyncCounters::rejected);
      fate("too_stale", &AsyncCounters::too_stale);
      fate("dropped", &AsyncCounters::dropped);
      fate("open", &AsyncCounters::open);
      show("codistill_leader_async_lost_updates",
           "Updates of single shards that went with a lost process.",
           [leader] { return static_cast<double>(leader->async_counters().lost_updates()); });
    }
    show("codistill_leader_restores", "Times the group was restored.",
         [leader] { return static_cast<double>(leader->counters().restores); });
    mirror("codistill_leader_checkpoints_total", "Checkpoints whose manifest was written.",
           [leader] { return static_cast<double>(leader->counters().checkpoints); });
    mirror("codistill_leader_pushes_rejected_total", "Pushes rejected by decision.",
           [leader] { return static_cast<double>(leader->counters().rejected); });
    mirror("codistill_leader_pushes_dropped_total", "Members' pushes that steps went on without.",
           [leader] { return static_cast<double>(leader->counters().dropped); });
  }
  auto mu = std::make_shared<Mutex>();  // collections may come from several requests
  GroupLeader* const leader = leader_.get();
  metrics->OnCollect([counters, gauges, mu, metrics, shard, leader] {
    MutexLock lock(mu.get());
    for (const RankPushes& rank : shard->push_counts()) {
      MirrorPushes(metrics, "codistill_server_pushes_total",
                   "Pushes to this shard, by rank and by what became of them.", rank.rank(),
                   rank.counts());
    }
    if (leader != nullptr) {
      for (const auto& [rank, counts] : leader->push_counts()) {
        MirrorPushes(metrics, "codistill_leader_push_answers_total",
                     "Answers of all shards to pushes, by rank and by what became of them.", rank,
                     counts);
      }
    }
    for (const Mirrored& m : *counters) {
      m.counter->Add(std::max(0.0, m.value() - m.counter->value()));
    }
    for (const Shown& s : *gauges) s.gauge->Set(s.value());
  });
}

}  // namespace codistill
