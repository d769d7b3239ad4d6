#include "tests/benchmarks/canned_server.h"

#include <signal.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"
#include "tests/benchmarks/pinned_process.h"
#include "tests/integration/job_harness.h"

namespace codistill {

absl::StatusOr<std::unique_ptr<CannedServer>> CannedServer::Start(const std::string& outputs,
                                                                  double sleep_seconds, int core) {
  auto server = std::make_unique<CannedServer>();
  const std::string ready = NewDirectory("canned") + "/ready.json";
  CODISTILL_ASSIGN_OR_RETURN(
      server->process_,
      StartPinned({RunfilesPath("tests/benchmarks/canned_inference_server"),
                   absl::StrCat("--outputs=", outputs),
                   absl::StrCat("--sleep_ms=", std::llround(sleep_seconds * 1000)),
                   absl::StrCat("--ready_file=", ready)},
                  ready, core, core));
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(ready, 1 << 16));
  server->address_ = nlohmann::json::parse(text).value("address", "");
  return server;
}

CannedServer::~CannedServer() {
  process_.Signal(SIGKILL);
  while (process_.running() && !process_.Poll()) absl::SleepFor(absl::Milliseconds(5));
}

JobConfig Taught(JobConfig job, const std::string& name, const std::string& address) {
  job.set_name(absl::StrCat(job.name(), "-", name));
  TeacherConfig* teacher = job.add_teachers();
  teacher->set_name("canned");
  teacher->mutable_external()->set_codistill_server(true);
  teacher->add_prediction_servers()->set_address(address);
  job.mutable_codistillation()->set_enabled(true);
  job.mutable_codistillation()->set_on_teacher_loss(CodistillationConfig::SKIP);
  // A slow teacher is to be slow, not to fail: questions of recurrent models outlive their steps.
  job.mutable_codistillation()->set_request_timeout_ms(600000);
  return job;
}

}  // namespace codistill
