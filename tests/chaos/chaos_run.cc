#include "tests/chaos/chaos_run.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/rpc/channel.h"
#include "common/rpc/grpc_status.h"
#include "proto/fault_injection.grpc.pb.h"

namespace codistill {
namespace {

constexpr absl::Duration kCallTimeout = absl::Seconds(5);
// A process whose point is not met by then is killed where it stands.
constexpr absl::Duration kPointPatience = absl::Seconds(8);

void AddRule(const std::string& point, FaultRuleProto::Kind kind, double probability,
             double delay_ms, InjectFaultsRequest* request) {
  FaultRuleProto* const rule = request->add_rules();
  rule->set_point(point);
  rule->set_kind(kind);
  rule->set_probability(probability);
  rule->set_delay_ms(delay_ms);
}

const std::vector<std::string>& PointsOf(const std::string& victim) {
  static const auto* const leader =
      new std::vector<std::string>{"leader.commit.sending",   "leader.commit.sent",
                                   "leader.checkpoint.files", "leader.checkpoint.manifest",
                                   "shard.commit.received",   "shard.commit.applied",
                                   "shard.push.ended"};
  static const auto* const shard = new std::vector<std::string>{
      "shard.push.ended", "shard.commit.received", "shard.commit.applied", "shard.commit.answered",
      "shard.checkpoint.written"};
  static const auto* const worker = new std::vector<std::string>{
      "worker.pulled", "worker.computed", "push.ended.0",
      "push.ended.1",  "worker.pushed",   "stream:/codistill.TensorTransfer/Push"};
  if (victim == "alpha.shard.0") return *leader;
  return victim == "alpha.shard.1" ? *shard : *worker;
}

class ChaosRun {
 public:
  ChaosRun(JobConfig job, uint64_t seed)
      : steps_(job.stop().steps()),
        network_(NetworkFaults(seed)),
        harness_(std::move(job), /*restart=*/true) {}

  absl::StatusOr<ChaosResult> Run(const std::vector<Kill>& kills) {
    const std::string plan = JoinPath(NewDirectory("faults"), "plan.textproto");
    CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(plan, network_.DebugString()));
    harness_.set_flags({"--allow_fault_injection", absl::StrCat("--fault_plan=", plan)});
    harness_.set_max_restarts(1000);
    CODISTILL_RETURN_IF_ERROR(harness_.Start());
    for (const Kill& kill : kills) CODISTILL_RETURN_IF_ERROR(Strike(kill));
    CODISTILL_RETURN_IF_ERROR(harness_.WaitUntilDone());
    CODISTILL_ASSIGN_OR_RETURN(result_.weights, harness_.NewestCut(0));
    CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness_.History(0));
    result_.restores = history.restores();
    CountFaults();
    CODISTILL_RETURN_IF_ERROR(harness_.Drain());
    return std::move(result_);
  }

 private:
  absl::StatusOr<int64_t> Step() {
    CODISTILL_ASSIGN_OR_RETURN(const GetHistoryReply history, harness_.History(0));
    return history.state().version().step();
  }

  absl::Status Strike(const Kill& kill) {
    CODISTILL_RETURN_IF_ERROR(harness_.WaitForStep(0, kill.step));
    const FleetMember& member = harness_.member(kill.victim);
    const int before = member.restarts;
    InjectFaultsRequest request = network_;
    FaultRuleProto* const rule = request.add_rules();
    rule->set_point(kill.point);
    rule->set_kind(FaultRuleProto::KILL);
    rule->set_after(kill.after);
    rule->set_times(1);
    const auto armed = InjectFaultsInto(member.address, request);
    const absl::Time give_up = absl::Now() + (armed.ok() ? kPointPatience : absl::ZeroDuration());
    bool forced = false;
    CODISTILL_RETURN_IF_ERROR(harness_.WaitFor(
        absl::StrCat("the successor of ", kill.victim), [&]() -> absl::StatusOr<bool> {
          if (member.restarts > before) return true;
          const absl::StatusOr<int64_t> at = Step();
          if (at.ok() && *at >= steps_) {
            return absl::FailedPreconditionError(
                absl::StrCat("the job came to its end; ", kill.point, " was not met"));
          }
          if (!forced && absl::Now() > give_up) {
            forced = true;
            harness_.Kill(kill.victim);
          }
          return false;
        }));
    const absl::Time restarted = absl::Now();
    // A restore takes the group back; moving again means a step after that.
    const absl::StatusOr<int64_t> at = Step();
    const int64_t from = at.ok() ? *at : -1;
    if (from >= steps_) return absl::OkStatus();
    int64_t lowest = from < 0 ? steps_ : from;
    CODISTILL_RETURN_IF_ERROR(harness_.WaitFor(
        absl::StrCat("a step after the loss of ", kill.victim), [&]() -> absl::StatusOr<bool> {
          const absl::StatusOr<int64_t> now = Step();
          if (!now.ok()) return false;
          if (*now > lowest) return true;
          lowest = std::min(lowest, *now);
          return *now >= steps_;
        }));
    const double seconds = absl::ToDoubleSeconds(absl::Now() - restarted);
    result_.longest_recovery = std::max(result_.longest_recovery, seconds);
    std::fprintf(stderr, "step %lld: %s killed at %s%s, moving again %.2f s after its restart\n",
                 static_cast<long long>(kill.step), kill.victim.c_str(), kill.point.c_str(),
                 forced ? " (not met; killed where it stood)" : "", seconds);
    return absl::OkStatus();
  }

  void CountFaults() {
    for (const auto& member : harness_.fleet().members()) {
      const auto reply = InjectFaultsInto(member->address, InjectFaultsRequest());
      if (!reply.ok()) continue;  // workers have ended
      for (const auto& count : reply->counts()) result_.faults += count.faults();
    }
  }

  const int64_t steps_;
  const InjectFaultsRequest network_;
  JobHarness harness_;
  ChaosResult result_;
};

}  // namespace

absl::StatusOr<InjectFaultsReply> InjectFaultsInto(const std::string& address,
                                                   const InjectFaultsRequest& request) {
  const auto stub = FaultInjection::NewStub(MakeChannel(address, ChannelUse::kControl));
  InjectFaultsReply reply;
  const auto context = MakeContext(absl::Now() + kCallTimeout);
  CODISTILL_RETURN_IF_ERROR(
      Annotate(FromGrpcStatus(stub->InjectFaults(context.get(), request, &reply)), address));
  return reply;
}

JobConfig ChaosJob(const std::string& name, int64_t steps) {
  JobConfig job = MlpJob(name, 1);
  job.mutable_groups(0)->set_num_workers(3);
  job.mutable_stop()->set_steps(steps);
  job.mutable_checkpoint()->set_every_steps(10);
  // Slots must come back with the weights, or the end would differ.
  job.mutable_training()->mutable_optimizer()->set_kind(OptimizerConfig::ADAM);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(1e-3);
  return job;
}

InjectFaultsRequest NetworkFaults(uint64_t seed) {
  InjectFaultsRequest request;
  request.set_seed(seed);
  AddRule("rpc:*", FaultRuleProto::DROP, 0.005, 0, &request);
  AddRule("rpc:*", FaultRuleProto::DROP_REPLY, 0.005, 0, &request);
  AddRule("rpc:*", FaultRuleProto::DUPLICATE, 0.02, 0, &request);
  AddRule("rpc:*", FaultRuleProto::REORDER, 0.01, 10, &request);
  AddRule("rpc:*", FaultRuleProto::DELAY, 0.02, 5, &request);
  AddRule("stream:*", FaultRuleProto::DROP, 0.005, 0, &request);
  AddRule("stream:*", FaultRuleProto::DROP_REPLY, 0.005, 0, &request);
  AddRule("stream:*", FaultRuleProto::DUPLICATE, 0.02, 0, &request);
  AddRule("stream:*", FaultRuleProto::REORDER, 0.1, 0, &request);
  AddRule("stream:*", FaultRuleProto::DELAY, 0.02, 5, &request);
  return request;
}

std::vector<Kill> SeededKills(uint64_t seed, int count, int64_t steps) {
  static constexpr const char* kVictims[] = {"alpha.shard.0", "alpha.worker.1", "alpha.shard.1",
                                             "alpha.worker.0", "alpha.worker.2"};
  constexpr uint64_t kNumVictims = 5;
  RandomStream random(Mix(seed, HashString("kills")));
  std::vector<Kill> kills;
  for (int i = 0; i < count; ++i) {
    Kill kill;
    // One in each of `count` equal parts of the first nine tenths of the run.
    const int64_t part = steps * 9 / 10 / count;
    kill.step = 1 + part * i + static_cast<int64_t>(random.Below(std::max<int64_t>(part / 2, 1)));
    kill.victim = kVictims[i < static_cast<int>(kNumVictims) ? i : random.Below(kNumVictims)];
    const std::vector<std::string>& points = PointsOf(kill.victim);
    kill.point = points[random.Below(points.size())];
    kill.after = static_cast<int64_t>(random.Below(3));
    kills.push_back(std::move(kill));
  }
  return kills;
}

absl::StatusOr<ChaosResult> TrainThroughChaos(JobConfig job, uint64_t seed,
                                              const std::vector<Kill>& kills) {
  return ChaosRun(std::move(job), seed).Run(kills);
}

}  // namespace codistill
