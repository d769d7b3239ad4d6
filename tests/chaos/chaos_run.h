#ifndef CODISTILL_TESTS_CHAOS_CHAOS_RUN_H_
#define CODISTILL_TESTS_CHAOS_CHAOS_RUN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/fault_injection.pb.h"
#include "proto/job.pb.h"
#include "tests/integration/job_harness.h"

namespace codistill {

// Gives a daemon its faults; answers with what the rules before have done.
absl::StatusOr<InjectFaultsReply> InjectFaultsInto(const std::string& address,
                                                   const InjectFaultsRequest& request);

// One group of three workers and two shards, SYNC, FIXED, without teachers: what is promised to end
// bitwise the same whatever happens to its processes and its network.
JobConfig ChaosJob(const std::string& name, int64_t steps);

// Calls and streams that get lost, answered to nobody, late, twice and in another order, in every
// process; drawn from `seed`.
InjectFaultsRequest NetworkFaults(uint64_t seed);

// A process to be killed where it says so, once the group has come to a step.
struct Kill {
  int64_t step = 0;
  std::string victim;  // "alpha.shard.0" is the leader
  std::string point;   // tests/chaos/README.md
  int64_t after = 0;   // hits of the point passed over first
};
// So many kills of leader, shard and workers at steps spread over the run, in order of steps. The
// first ones go round all kinds of victims.
std::vector<Kill> SeededKills(uint64_t seed, int count, int64_t steps);

struct ChaosResult {
  Weights weights;
  int64_t restores = 0;
  int64_t faults = 0;           // of the network, in the processes alive at the end
  double longest_recovery = 0;  // seconds from a successor's readiness to the next committed step
};
// Trains the job to its end under network faults and kills.
absl::StatusOr<ChaosResult> TrainThroughChaos(JobConfig job, uint64_t seed,
                                              const std::vector<Kill>& kills);

}  // namespace codistill

#endif  // CODISTILL_TESTS_CHAOS_CHAOS_RUN_H_
