#include "control/exporter.h"

#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/crc32c.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "control/child_process.h"

namespace codistill {
namespace {

bool Exists(const std::string& path) { return access(path.c_str(), R_OK) == 0; }

// Everything an archive depends on that a user changes.
std::string Recipe(const ModelExport& config, const std::string& module, uint64_t seed) {
  std::string recipe = absl::StrCat("module ", module, "\nseed ", seed, "\n");
  if (absl::EndsWith(module, ".py")) {
    const absl::StatusOr<std::string> source = ReadFile(module, 16 << 20);
    if (source.ok()) absl::StrAppend(&recipe, "crc32c ", Crc32c(*source), "\n");
  }
  for (const ModelExport::Option& option : config.options()) {
    absl::StrAppend(&recipe, "option ", option.key(), "=", option.value(), "\n");
  }
  return recipe;
}

}  // namespace

absl::StatusOr<std::string> FindExporter(const std::string& flag) {
  if (!flag.empty()) {
    if (Exists(flag)) return flag;
    return absl::NotFoundError(absl::StrCat("--exporter: no file ", flag));
  }
  char buffer[4096];
  const ssize_t length = readlink("/proc/self/exe", buffer, sizeof(buffer) - 1);
  const std::string self(buffer, length > 0 ? length : 0);
  const std::string here = DirName(self);
  // A test of Bazel's names the tree of its inputs. That of the binary itself may be an older one:
  // Bazel does not bring it up to date for a test that only has the binary among its inputs.
  const char* const runfiles = std::getenv("RUNFILES_DIR");
  const std::vector<std::string> places = {
      absl::StrCat(runfiles == nullptr ? self + ".runfiles" : runfiles,
                   "/codistill/models/export.py"),
      here + "/models/export.py",
      here + "/../share/codistill/models/export.py",
      "models/export.py",
  };
  for (const std::string& place : places) {
    if (Exists(place)) return place;
  }
  return absl::NotFoundError(absl::StrCat(
      "models/export.py is in none of ", absl::StrJoin(places, ", "), "; name it with --exporter"));
}

absl::Status ExportModels(const JobConfig& job, const std::string& job_directory,
                          const std::string& python, const std::string& exporter,
                          const std::string& directory, bool resume,
                          const std::function<bool()>& cancelled) {
  CODISTILL_RETURN_IF_ERROR(FileSystem::Real()->MakeDirs(directory));
  const ModelExport& config = job.model().export_();
  std::string module = config.module();
  if (absl::EndsWith(module, ".py")) module = JoinPath(job_directory, module);
  for (int g = 0; g < job.groups_size(); ++g) {
    const std::string prefix = JoinPath(directory, job.groups(g).name());
    const std::string recipe_path = prefix + ".recipe";
    const std::string recipe = Recipe(config, module, Mix(job.seed(), g) >> 33);
    const absl::StatusOr<std::string> made_by = ReadFile(recipe_path, 1 << 20);
    if (made_by.ok() && *made_by == recipe) continue;
    if (made_by.ok() && resume) {
      return absl::InvalidArgumentError(absl::StrCat(
          "model.export: a resumed run keeps its model, but the job's module, options or "
          "seed are not those group ",
          job.groups(g).name(), " was made with (", recipe_path, ")"));
    }
    unlink(recipe_path.c_str());
    std::vector<std::string> argv = {python, exporter, "--module", module, "--out", prefix};
    // torch takes seeds below 2^63; any 31 bits do.
    argv.push_back("--seed");
    argv.push_back(absl::StrCat(Mix(job.seed(), g) >> 33));
    for (const ModelExport::Option& option : config.options()) {
      argv.push_back("--option");
      argv.push_back(absl::StrCat(option.key(), "=", option.value()));
    }
    const std::string log = prefix + ".export.log";
    unlink(log.c_str());
    CODISTILL_ASSIGN_OR_RETURN(ChildProcess child, ChildProcess::Start(argv, log));
    const absl::Time deadline = absl::Now() + absl::Minutes(5);
    while (!child.Poll()) {
      const bool interrupted = cancelled && cancelled();
      if (interrupted || absl::Now() > deadline) {
        child.Signal(SIGKILL);
        while (!child.Poll()) absl::SleepFor(absl::Milliseconds(5));
        if (interrupted) return absl::CancelledError("interrupted");
        return absl::DeadlineExceededError(
            absl::StrCat("exporting model \"", module, "\" took longer than 5 minutes; see ", log));
      }
      absl::SleepFor(absl::Milliseconds(10));
    }
    if (!child.Poll()->clean()) {
      return absl::InvalidArgumentError(absl::StrCat("model.export: models/export.py --module ",
                                                     module, " ", child.Poll()->ToString(), ":\n",
                                                     TailOfFile(log, 24)));
    }
    // Last: who finds the recipe finds the files it made.
    CODISTILL_RETURN_IF_ERROR(WriteFileAtomically(recipe_path, recipe));
  }
  return absl::OkStatus();
}

}  // namespace codistill
