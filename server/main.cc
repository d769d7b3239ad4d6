// The parameter-server daemon: one shard of one group, and in shard 0 the group's leader.

#include <memory>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/heap.h"
#include "common/base/status.h"
#include "common/config/job.h"
#include "common/daemon/daemon.h"
#include "common/metrics/metrics.h"
#include "server/parameter_server.h"

ABSL_FLAG(std::string, job, "", "Job file (text proto of message JobConfig). Required.");
ABSL_FLAG(std::string, group, "",
          "Name of the group this shard belongs to. Default: the job's only group.");
ABSL_FLAG(int, shard, 0, "Index of this shard in its group; shard 0 leads the group.");

namespace codistill {
namespace {

constexpr char kKind[] = "parameter_server";

absl::Status RunServer(const std::vector<std::string>& arguments) {
  if (!arguments.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("unexpected argument ", arguments[0]));
  }
  const std::string path = absl::GetFlag(FLAGS_job);
  if (path.empty()) return absl::InvalidArgumentError("--job: is required");
  CODISTILL_ASSIGN_OR_RETURN(JobConfig job, LoadJob(path));
  int group = 0;
  if (!absl::GetFlag(FLAGS_group).empty()) {
    CODISTILL_ASSIGN_OR_RETURN(group, FindGroup(job, absl::GetFlag(FLAGS_group)));
  } else if (job.groups_size() != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--group: is required, as the job has ", job.groups_size(), " groups"));
  }
  const GroupConfig& config = job.groups(group);
  const int shard = absl::GetFlag(FLAGS_shard);
  const std::unique_ptr<Metrics> metrics = Metrics::Create(
      {{"job", job.name()}, {"group", config.name()}, {"shard", absl::StrCat(shard)}});

  ParameterServer::Options options;
  options.job = job;
  options.group = group;
  options.shard = shard;
  options.metrics = metrics.get();
  // Set before anything can be superseded: claims are made in Start.
  Daemon* running = nullptr;
  options.on_superseded = [&running](absl::Status status) { running->Stop(std::move(status)); };
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ParameterServer> server,
                             ParameterServer::Create(std::move(options)));

  Daemon::Options daemon_options;
  daemon_options.kind = kKind;
  daemon_options.job = job.name();
  daemon_options.run_id = RunId(job);
  daemon_options.group = config.name();
  daemon_options.index = shard;
  if (shard < config.shards_size()) {
    daemon_options.address = config.shards(shard).address();
    daemon_options.http_address = config.shards(shard).http_address();
  }
  daemon_options.services = server->services();
  daemon_options.bulk = server->bulk();
  daemon_options.registries = server->registries();
  daemon_options.metrics = metrics.get();
  ParameterServer* const raw = server.get();
  daemon_options.fill_status = [raw](DaemonStatus* status) { raw->FillStatus(status); };
  daemon_options.ready = [raw] { return raw->ready(); };
  if (raw->leads()) {
    daemon_options.pause = [raw] { return raw->Pause(); };
    daemon_options.resume = [raw] { return raw->Resume(); };
    daemon_options.checkpoint = [raw] { return raw->Checkpoint(); };
  }
  daemon_options.drain = [raw] { return raw->Drain(); };
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<Daemon> daemon,
                             Daemon::Start(std::move(daemon_options)));
  running = daemon.get();
  server->Start(daemon->address());
  return daemon->Run();
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  codistill::ConfigureHeapForTensors();
  const std::vector<std::string> arguments = codistill::InitDaemon(
      argc, argv, "A parameter server of one replica group: --job FILE --group NAME --shard N");
  return codistill::ExitCode(codistill::kKind, codistill::RunServer(arguments));
}
