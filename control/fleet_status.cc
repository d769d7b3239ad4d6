#include "control/fleet_status.h"

#include <sys/stat.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "control/daemon_client.h"
#include "control/json_output.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

bool IsDirectory(const std::string& path) {
  struct stat st;
  return stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

DaemonReport Ask(std::string name, std::string address, absl::Duration timeout) {
  DaemonReport report{std::move(name), std::move(address), absl::UnknownError("")};
  report.status = report.address.empty()
                      ? absl::StatusOr<DaemonStatus>(absl::UnavailableError("address not known"))
                      : GetDaemonStatus(report.address, timeout);
  return report;
}

// Address in a ready file, empty if there is none.
std::string AddressInReadyFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, 1 << 16);
  if (!text.ok()) return "";
  const auto json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  return json.is_object() ? json.value("address", "") : "";
}

}  // namespace

absl::StatusOr<JobLocation> LocateJob(const std::string& path) {
  JobLocation location;
  const bool directory = IsDirectory(path);
  if (directory) location.run_directory = path;
  CODISTILL_ASSIGN_OR_RETURN(location.job,
                             LoadJob(directory ? JoinPath(path, "job.textproto") : path));
  for (const GroupConfig& group : location.job.groups()) {
    if (group.shards().empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          path, ": group ", group.name(),
          " has no shard addresses; give the --out directory of the run, or a job with addresses"));
    }
  }
  return location;
}

absl::StatusOr<std::string> LeaderAddress(const JobConfig& job, int group) {
  if (job.groups(group).shards().empty() || job.groups(group).shards(0).address().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("groups[", group, "].shards[0].address: not known; the group is not up"));
  }
  return job.groups(group).shards(0).address();
}

std::vector<DaemonReport> AskDaemons(const JobLocation& location, absl::Duration timeout) {
  std::vector<DaemonReport> out;
  for (const GroupConfig& group : location.job.groups()) {
    DaemonStatus leader;
    for (int i = 0; i < group.shards_size(); ++i) {
      out.push_back(
          Ask(absl::StrCat(group.name(), ".shard.", i), group.shards(i).address(), timeout));
      if (i == 0 && out.back().status.ok()) leader = *out.back().status;
    }
    for (int i = 0; i < group.prediction_servers_size(); ++i) {
      out.push_back(Ask(absl::StrCat(group.name(), ".prediction.", i),
                        group.prediction_servers(i).address(), timeout));
    }
    int workers = group.num_workers();
    for (const MemberStatus& member : leader.members()) {  // ELASTIC: more may have joined
      workers = std::max(workers, member.rank() + 1);
    }
    for (int i = 0; i < workers; ++i) {
      std::string address;
      for (const MemberStatus& member : leader.members()) {
        if (member.rank() == i) address = member.address();
      }
      out.push_back(Ask(absl::StrCat(group.name(), ".worker.", i), address, timeout));
    }
  }
  for (const TeacherConfig& teacher : location.job.teachers()) {
    if (teacher.has_external()) continue;  // not ours: it need not have a Control service
    for (int i = 0; i < teacher.prediction_servers_size(); ++i) {
      out.push_back(Ask(absl::StrCat(teacher.name(), ".prediction.", i),
                        teacher.prediction_servers(i).address(), timeout));
    }
  }
  if (!location.run_directory.empty() && location.job.evaluator().enabled()) {
    out.push_back(Ask("evaluator",
                      AddressInReadyFile(JoinPath(location.run_directory, "run", "evaluator.json")),
                      timeout));
  }
  return out;
}

namespace {

// A leader's account of its workers' pushes; empty if there is none yet.
std::string PushTable(const std::string& name, const GetHistoryReply& history) {
  if (history.pushes_size() == 0) return "";
  const MembershipCounts& m = history.membership();
  std::string out = absl::StrFormat(
      "\n%s: %d workers take part (%d joined, %d left, %d replaced, %d leases ended); answers of "
      "all "
      "shards to their pushes:\n%6s %10s %10s %10s %10s %10s %10s %10s %10s\n",
      name, m.members(), m.joined(), m.left(), m.replaced(), m.leases_ended(), "rank", "begun",
      "applied", "late", "too stale", "rejected", "duplicate", "refused", "lost");
  for (const RankPushes& rank : history.pushes()) {
    const PushCounts& c = rank.counts();
    absl::StrAppendFormat(&out, "%6d %10d %10d %10d %10d %10d %10d %10d %10d\n", rank.rank(),
                          c.begun(), c.applied(), c.dropped_late(), c.too_stale(), c.rejected(),
                          c.duplicate(), c.refused(), c.lost());
  }
  return out;
}

}  // namespace

std::string StatusTable(const std::vector<DaemonReport>& reports) {
  std::string out = absl::StrFormat("%-22s %-12s %8s %16s  %-21s %-21s %s\n", "daemon", "state",
                                    "step", "rate", "grpc", "http", "detail");
  for (const DaemonReport& report : reports) {
    if (!report.status.ok()) {
      absl::StrAppendFormat(&out, "%-22s %-12s %8s %16s  %-21s %-21s %s\n", report.name,
                            "unreachable", "-", "-", report.address, "",
                            std::string(report.status.status().message()));
      continue;
    }
    const DaemonStatus& s = *report.status;
    absl::StrAppendFormat(&out, "%-22s %-12s %8d %16s  %-21s %-21s %s\n", report.name, s.state(),
                          s.step(), absl::StrFormat("%.1f %s", s.rate(), s.rate_unit()),
                          s.address(), s.http_address(), s.detail());
  }
  for (const DaemonReport& report : reports) {
    if (report.status.ok()) out += PushTable(report.name, report.status->history());
  }
  return out;
}

std::string StatusJson(const std::vector<DaemonReport>& reports) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const DaemonReport& report : reports) {
    nlohmann::ordered_json item;
    item["name"] = report.name;
    item["reachable"] = report.status.ok();
    if (report.status.ok()) {
      item["status"] = nlohmann::ordered_json::parse(ToJson(*report.status));
    } else {
      item["address"] = report.address;
      item["error"] = report.status.status().ToString();
    }
    list.push_back(std::move(item));
  }
  nlohmann::ordered_json top;
  top["daemons"] = std::move(list);
  return top.dump(2);
}

}  // namespace codistill
