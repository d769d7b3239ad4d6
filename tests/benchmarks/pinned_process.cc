#include "tests/benchmarks/pinned_process.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/status.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

constexpr absl::Duration kStartLimit = absl::Seconds(60);

}  // namespace

absl::StatusOr<ChildProcess> StartPinned(const std::vector<std::string>& argv,
                                         const std::string& ready_file, int core, int own_core) {
  unlink(ready_file.c_str());
  // A child begins where its parent is.
  CODISTILL_RETURN_IF_ERROR(core == kAnyCore ? Unpin() : PinToCore(core));
  absl::StatusOr<ChildProcess> child = ChildProcess::Start(argv, ready_file + ".log");
  CODISTILL_RETURN_IF_ERROR(own_core == kAnyCore ? Unpin() : PinToCore(own_core));
  CODISTILL_RETURN_IF_ERROR(child.status());
  for (const absl::Time end = absl::Now() + kStartLimit; access(ready_file.c_str(), R_OK) != 0;) {
    if (child->Poll() || absl::Now() > end) {
      return absl::InternalError(
          absl::StrCat(argv[0], " does not start:\n", TailOfFile(ready_file + ".log", 20)));
    }
    absl::SleepFor(absl::Milliseconds(10));
  }
  return child;
}

absl::StatusOr<std::unique_ptr<PipedProcess>> PipedProcess::Start(
    const std::vector<std::string>& args, int core) {
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
    CPU_SET(core == kAnyCore ? 0 : core, &cores);
    if (core != kAnyCore && sched_setaffinity(0, sizeof(cores), &cores) != 0) _exit(126);
    execv(argv[0], argv.data());
    _exit(127);
  }
  unsetenv("OPENBLAS_NUM_THREADS");
  unsetenv("OMP_NUM_THREADS");
  close(to[0]);
  close(from[1]);
  std::unique_ptr<PipedProcess> process(
      new PipedProcess(pid, fdopen(to[1], "w"), fdopen(from[0], "r")));
  CODISTILL_RETURN_IF_ERROR(Annotate(process->ReadLine().status(), args[0]));
  return process;
}

PipedProcess::~PipedProcess() {
  std::fclose(to_);  // the end of its input is the end of it
  std::fclose(from_);
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

absl::StatusOr<nlohmann::json> PipedProcess::Ask(const std::string& line) {
  std::fprintf(to_, "%s\n", line.c_str());
  std::fflush(to_);
  return ReadLine();
}

absl::StatusOr<nlohmann::json> PipedProcess::ReadLine() {
  char* line = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&line, &capacity, from_);
  const std::string text(line == nullptr || length < 0 ? "" : line);
  free(line);
  // One that ended has said why on stderr.
  if (text.empty()) return absl::InternalError("the process has ended");
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InternalError(absl::StrCat("the process said ", text));
  return json;
}

}  // namespace codistill
