#include "tests/benchmarks/bare_process.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

// One line of JSON; a child that ended has said why on stderr.
absl::StatusOr<nlohmann::json> ReadLine(std::FILE* from) {
  char* line = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&line, &capacity, from);
  const std::string text(line == nullptr || length < 0 ? "" : line);
  free(line);
  if (text.empty()) return absl::InternalError("bare_loop has ended");
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InternalError(absl::StrCat("bare_loop said ", text));
  return json;
}

}  // namespace

absl::StatusOr<std::unique_ptr<BareProcess>> BareProcess::Start(const Options& options) {
  const std::vector<std::string> args = {options.binary,
                                         options.job,
                                         options.data_dir,
                                         absl::StrCat(options.batches),
                                         absl::StrCat(options.chunk_rows),
                                         options.optimize_graph ? "1" : "0"};
  std::vector<char*> argv;
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  // Its BLAS library reads this when it is loaded.
  setenv("OPENBLAS_NUM_THREADS", "1", 1);
  setenv("OMP_NUM_THREADS", "1", 1);
  int to[2], from[2];
  if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) {
    return absl::InternalError("no pipes");
  }
  const pid_t pid = fork();
  if (pid < 0) return absl::InternalError("cannot fork");
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(to[0], STDIN_FILENO);
    dup2(from[1], STDOUT_FILENO);
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(options.core, &cores);
    if (sched_setaffinity(0, sizeof(cores), &cores) != 0) _exit(126);
    execv(argv[0], argv.data());
    _exit(127);
  }
  unsetenv("OPENBLAS_NUM_THREADS");
  unsetenv("OMP_NUM_THREADS");
  close(to[0]);
  close(from[1]);
  std::unique_ptr<BareProcess> process(
      new BareProcess(pid, fdopen(to[1], "w"), fdopen(from[0], "r")));
  CODISTILL_RETURN_IF_ERROR(ReadLine(process->from_));
  return process;
}

BareProcess::~BareProcess() {
  std::fclose(to_);  // the end of its input is the end of it
  std::fclose(from_);
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

absl::StatusOr<BareProcess::Result> BareProcess::Run(int steps) {
  std::fprintf(to_, "%d\n", steps);
  std::fflush(to_);
  CODISTILL_ASSIGN_OR_RETURN(const nlohmann::json json, ReadLine(from_));
  Result result;
  result.seconds = json.value("seconds", 0.0);
  result.processor_seconds = json.value("processor_seconds", 0.0);
  result.losses = json.value("losses", std::vector<double>());
  return result;
}

}  // namespace codistill
