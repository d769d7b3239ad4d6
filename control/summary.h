#ifndef CODISTILL_CONTROL_SUMMARY_H_
#define CODISTILL_CONTROL_SUMMARY_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/optional.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "proto/run_summary.pb.h"

namespace codistill {

// What is known of a run when it has ended.
struct RunResult {
  JobConfig job;
  double wall_seconds = 0;
  std::vector<GetHistoryReply> histories;     // by group index
  absl::optional<double> group_disagreement;  // not set: not measured
};

// Mean |p_a - p_b| as the evaluator wrote it; errors name the file.
absl::StatusOr<double> ReadDisagreement(const std::string& evaluation_file);

RunSummary MakeSummary(const RunResult& result);

// The curves as "group,step,name,value" lines, ordered by group and step.
std::string MetricsCsv(const RunResult& result);

// The summary for people, a few lines.
std::string SummaryText(const RunSummary& summary);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_SUMMARY_H_
