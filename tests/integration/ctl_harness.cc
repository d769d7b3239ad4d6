#include "tests/integration/ctl_harness.h"

#include <dirent.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "common/checkpoint/manifest.h"
#include "common/config/job.h"
#include "gtest/gtest.h"
#include "tests/integration/job_harness.h"

namespace codistill {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(20);

std::string Slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// The fields of /proc/PID/stat behind the command's name, which may hold anything: state, parent...
std::vector<std::string> StatFields(pid_t pid) {
  const std::string text = Slurp(absl::StrCat("/proc/", pid, "/stat"));
  const size_t end = text.rfind(')');
  if (end == std::string::npos || end + 2 >= text.size()) return {};
  return absl::StrSplit(text.substr(end + 2), ' ');
}

std::vector<pid_t> AllProcesses() {
  std::vector<pid_t> out;
  DIR* directory = opendir("/proc");
  if (directory == nullptr) std::abort();
  while (const dirent* entry = readdir(directory)) {
    pid_t pid = 0;
    if (absl::SimpleAtoi(entry->d_name, &pid)) out.push_back(pid);
  }
  closedir(directory);
  return out;
}

std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> out;
  for (const pid_t pid : AllProcesses()) {
    const std::vector<std::string> fields = StatFields(pid);
    if (fields.size() > 1 && fields[1] == absl::StrCat(parent)) out.push_back(pid);
  }
  return out;
}

}  // namespace

Command::Command(const std::vector<std::string>& argv)
    : out_path_(NewDirectory("command") + "/out"), err_path_(DirName(out_path_) + "/err") {
  setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
  // The shell sends errors elsewhere and becomes the command.
  std::vector<std::string> all = {"/bin/sh", "-c", "exec \"$@\" 2>\"$0\"", err_path_};
  all.insert(all.end(), argv.begin(), argv.end());
  absl::StatusOr<ChildProcess> started = ChildProcess::Start(all, out_path_);
  if (!started.ok()) {
    std::fprintf(stderr, "%s\n", started.status().ToString().c_str());
    std::abort();
  }
  process_ = *std::move(started);
}

Command::~Command() {
  process_.Signal(SIGKILL);
  WaitUntil([this] { return !running(); });
}

std::string Command::Out() const { return Slurp(out_path_); }
std::string Command::Err() const { return Slurp(err_path_); }

CommandResult Command::Wait() {
  if (!WaitUntil([this] { return !running(); })) {
    process_.Signal(SIGKILL);
    WaitUntil([this] { return !running(); });
  }
  return {*process_.Poll(), Out(), Err()};
}

std::vector<std::string> CtlArgv(std::vector<std::string> args) {
  args.insert(args.begin(), RunfilesPath("control/codistillctl"));
  return args;
}

CommandResult Ctl(const std::vector<std::string>& args) { return Command(CtlArgv(args)).Wait(); }

std::string WriteText(const std::string& name, const std::string& text) {
  const std::string path = JoinPath(NewDirectory("file"), name);
  const absl::Status status = WriteFileAtomically(path, text);
  EXPECT_TRUE(status.ok()) << status;
  return path;
}

std::string WriteJob(const JobConfig& job) {
  const std::string path = JoinPath(NewDirectory("job"), "job.textproto");
  const absl::Status status = SaveJob(job, path);
  EXPECT_TRUE(status.ok()) << status;
  return path;
}

OrphanCatcher::OrphanCatcher() { prctl(PR_SET_CHILD_SUBREAPER, 1); }

OrphanCatcher::~OrphanCatcher() {
  // Killing one makes its children ours: until there are none.
  const absl::Time give_up = absl::Now() + kPatience;
  while (absl::Now() < give_up) {
    const std::vector<pid_t> children = ChildrenOf(getpid());
    if (children.empty()) return;
    for (const pid_t pid : children) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
  }
  ADD_FAILURE() << "there is no end of child processes";
}

std::vector<pid_t> ProcessesWith(const std::string& text) {
  std::vector<pid_t> out;
  for (const pid_t pid : AllProcesses()) {
    if (pid == getpid()) continue;
    const std::vector<std::string> fields = StatFields(pid);
    if (fields.empty() || fields[0] == "Z") continue;
    if (absl::StrContains(Slurp(absl::StrCat("/proc/", pid, "/cmdline")), text)) out.push_back(pid);
  }
  return out;
}

bool WaitUntil(const std::function<bool()>& done) {
  const absl::Time give_up = absl::Now() + kPatience;
  while (!done()) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(kPoll);
  }
  return true;
}

nlohmann::json ParseJson(const std::string& text) {
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) {
    ADD_FAILURE() << "no JSON: " << text.substr(0, 1000);
    return nullptr;
  }
  return json;
}

nlohmann::json ReadJson(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, 64 << 20);
  if (!text.ok()) {
    ADD_FAILURE() << text.status();
    return nullptr;
  }
  return ParseJson(*text);
}

nlohmann::json AwaitStatus(const std::string& out, int64_t step) {
  nlohmann::json found;
  std::string last;
  const bool came = WaitUntil([&] {
    const CommandResult result = Ctl({"status", out, "--json"});
    last = result.out + result.err;
    if (!result.exit.clean()) return false;
    nlohmann::json json = ParseJson(result.out);
    for (const auto& daemon : json["daemons"]) {
      const auto& status = daemon["status"];
      if (status["kind"] == "parameter_server" && status["step"].get<int64_t>() < step) {
        return false;
      }
    }
    found = std::move(json);
    return true;
  });
  if (!came) ADD_FAILURE() << "not every daemon came to step " << step << ": " << last;
  return found;
}

std::vector<int64_t> VerifiedCheckpoints(const std::string& out, const std::string& group) {
  const std::string path = JoinPath(out, "checkpoints", group);
  std::set<int64_t> steps;
  DIR* directory = opendir(path.c_str());
  if (directory == nullptr) return {};
  while (const dirent* entry = readdir(directory)) {
    Version version;
    if (!ParseManifestName(entry->d_name, &version)) continue;
    const auto manifest = ReadManifest(JoinPath(path, entry->d_name));
    const absl::Status status =
        manifest.ok() ? VerifyCheckpoint(path, *manifest) : manifest.status();
    EXPECT_TRUE(status.ok()) << status;
    if (status.ok()) steps.insert(version.step());
  }
  closedir(directory);
  return {steps.begin(), steps.end()};
}

}  // namespace codistill
