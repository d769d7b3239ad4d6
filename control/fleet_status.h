#ifndef CODISTILL_CONTROL_FLEET_STATUS_H_
#define CODISTILL_CONTROL_FLEET_STATUS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/control.pb.h"
#include "proto/job.pb.h"

namespace codistill {

// A daemon that should be there, and what it said.
struct DaemonReport {
  std::string name;     // "alpha.shard.0"
  std::string address;  // empty if unknown
  absl::StatusOr<DaemonStatus> status;
};

// Addresses of a running job: a run directory (--out of `run`) or a job file that gives addresses.
struct JobLocation {
  JobConfig job;
  std::string run_directory;  // empty for a job file
};
absl::StatusOr<JobLocation> LocateJob(const std::string& path);

// Asks every daemon: shards and prediction servers by the job's addresses, workers by what their
// leader knows, the evaluator by the run directory. One that does not answer within `timeout` is
// reported so.
std::vector<DaemonReport> AskDaemons(const JobLocation& location, absl::Duration timeout);

// A table for people: name, state, step, rate, addresses, detail.
std::string StatusTable(const std::vector<DaemonReport>& reports);
std::string StatusJson(const std::vector<DaemonReport>& reports);

// Address of a group's leader; FAILED_PRECONDITION if the job does not give it.
absl::StatusOr<std::string> LeaderAddress(const JobConfig& job, int group);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_FLEET_STATUS_H_
