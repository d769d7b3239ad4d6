#include "control/checkpoint_command.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/checkpoint/checkpoint_catalog.h"
#include "common/checkpoint/checkpoint_tensors.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/safetensors.h"
#include "common/tensor/tensor.h"
#include "control/child_process.h"
#include "control/exporter.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

using Json = nlohmann::ordered_json;

struct Found {
  Version version;
  absl::StatusOr<CheckpointManifest> manifest = absl::UnknownError("not read");
};

// Newest first.
absl::StatusOr<std::vector<Found>> ReadManifests(const std::string& directory) {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> names,
                             FileSystem::Real()->ListDir(directory));
  std::vector<Found> found;
  for (const std::string& name : names) {
    Found item;
    if (!ParseManifestName(name, &item.version)) continue;
    item.manifest = ReadManifest(JoinPath(directory, name));
    found.push_back(std::move(item));
  }
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return std::make_pair(a.version.generation(), a.version.step()) >
           std::make_pair(b.version.generation(), b.version.step());
  });
  return found;
}

bool HasManifests(const std::string& directory) {
  const auto names = FileSystem::Real()->ListDir(directory);
  if (!names.ok()) return false;
  Version version;
  return std::any_of(names->begin(), names->end(),
                     [&](const std::string& name) { return ParseManifestName(name, &version); });
}

uint64_t BytesOf(const CheckpointManifest& manifest) {
  uint64_t bytes = 0;
  for (const CheckpointFile& file : manifest.files()) bytes += file.bytes();
  return bytes;
}

std::string AgeOf(const CheckpointManifest& manifest, absl::Time now) {
  if (manifest.created_unix_ms() == 0) return "?";
  const absl::Duration age = now - absl::FromUnixMillis(manifest.created_unix_ms());
  return absl::FormatDuration(absl::Trunc(age, absl::Seconds(1)));
}

class Command {
 public:
  Command(const CheckpointCommandOptions& options, std::string* output, bool* damaged)
      : options_(options), output_(output), damaged_(damaged) {}

  absl::Status Run() {
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<CheckpointPlace> places,
                               FindCheckpoints(options_.target, options_.group));
    if (options_.verb == "list") return List(places);
    if (options_.verb == "verify") return Verify(places);
    if (places.size() != 1) {
      std::vector<std::string> groups;
      for (const CheckpointPlace& place : places) groups.push_back(place.group);
      return absl::InvalidArgumentError(absl::StrCat(options_.target, " has checkpoints of ",
                                                     absl::StrJoin(groups, ", "),
                                                     "; choose one with --group"));
    }
    if (options_.out.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(options_.verb, " needs --out ", options_.verb == "export" ? "FILE" : "DIR"));
    }
    return options_.verb == "reshard" ? Reshard(places[0]) : Export(places[0]);
  }

 private:
  absl::Status List(const std::vector<CheckpointPlace>& places) {
    Json json = Json::array();
    std::string table =
        absl::StrFormat("%-12s %10s %10s %7s %12s %-10s %s\n", "GROUP", "GENERATION", "STEP",
                        "SHARDS", "BYTES", "OPTIMIZER", "AGE");
    for (const CheckpointPlace& place : places) {
      CODISTILL_ASSIGN_OR_RETURN(const std::vector<Found> found, ReadManifests(place.directory));
      for (const Found& item : found) {
        Json entry = {{"group", place.group},
                      {"generation", item.version.generation()},
                      {"step", item.version.step()},
                      {"manifest", JoinPath(place.directory, ManifestName(item.version))}};
        if (!item.manifest.ok()) {
          *damaged_ = true;
          entry["error"] = std::string(item.manifest.status().message());
          absl::StrAppendFormat(&table, "%-12s %10d %10d DAMAGED: %s\n", place.group,
                                item.version.generation(), item.version.step(),
                                item.manifest.status().message());
        } else {
          const CheckpointManifest& manifest = *item.manifest;
          entry["shards"] = manifest.files_size();
          entry["bytes"] = BytesOf(manifest);
          entry["optimizer"] = manifest.optimizer();
          entry["job"] = manifest.job();
          entry["created_unix_ms"] = manifest.created_unix_ms();
          absl::StrAppendFormat(&table, "%-12s %10d %10d %7d %12d %-10s %s\n", place.group,
                                item.version.generation(), item.version.step(),
                                manifest.files_size(), BytesOf(manifest), manifest.optimizer(),
                                AgeOf(manifest, options_.now));
        }
        json.push_back(std::move(entry));
      }
    }
    *output_ = options_.json ? json.dump(2) + "\n" : table;
    return absl::OkStatus();
  }

  absl::Status Verify(const std::vector<CheckpointPlace>& places) {
    Json json = Json::array();
    std::string text;
    for (const CheckpointPlace& place : places) {
      CODISTILL_ASSIGN_OR_RETURN(const std::vector<Found> found, ReadManifests(place.directory));
      for (const Found& item : found) {
        if (options_.step != 0 && item.version.step() != options_.step) continue;
        const std::string path = JoinPath(place.directory, ManifestName(item.version));
        const absl::Status status = VerifyOne(place.directory, item);
        *damaged_ |= !status.ok();
        absl::StrAppend(&text, path, ": ",
                        status.ok() ? absl::StrCat("whole, ", BytesOf(*item.manifest), " bytes in ",
                                                   item.manifest->files_size(), " files")
                                    : absl::StrCat("DAMAGED: ", status.message()),
                        "\n");
        Json entry = {{"group", place.group}, {"manifest", path}, {"whole", status.ok()}};
        if (!status.ok()) entry["error"] = std::string(status.message());
        json.push_back(std::move(entry));
      }
    }
    if (json.empty()) {
      return absl::NotFoundError(
          absl::StrCat(options_.target, ": no checkpoint of step ", options_.step));
    }
    *output_ = options_.json ? json.dump(2) + "\n" : text;
    return absl::OkStatus();
  }

  // Every byte of every file, and that together they hold the whole model.
  absl::Status VerifyOne(const std::string& directory, const Found& item) {
    CODISTILL_RETURN_IF_ERROR(item.manifest.status());
    CODISTILL_RETURN_IF_ERROR(VerifyCheckpoint(directory, *item.manifest));
    for (const CheckpointFile& file : item.manifest->files()) {
      CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<ShardFileReader> reader,
                                 ShardFileReader::Open(JoinPath(directory, file.name())));
      CODISTILL_RETURN_IF_ERROR(reader->VerifyAll());
    }
    return CheckpointTensors::Open(directory, *item.manifest).status();
  }

  // The chosen checkpoint, opened.
  absl::StatusOr<std::unique_ptr<CheckpointTensors>> Choose(const CheckpointPlace& place) {
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<Found> found, ReadManifests(place.directory));
    for (const Found& item : found) {
      if (options_.step != 0 && item.version.step() != options_.step) continue;
      CODISTILL_RETURN_IF_ERROR(item.manifest.status());
      return CheckpointTensors::Open(place.directory, *item.manifest);
    }
    std::vector<std::string> steps;
    for (const Found& item : found) steps.push_back(absl::StrCat(item.version.step()));
    return absl::NotFoundError(absl::StrCat(place.directory, ": no checkpoint of step ",
                                            options_.step,
                                            "; there are: ", absl::StrJoin(steps, ", ")));
  }

  absl::Status Reshard(const CheckpointPlace& place) {
    if (options_.shards < 1) return absl::InvalidArgumentError("reshard needs --shards N");
    CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointTensors> tensors, Choose(place));
    CODISTILL_ASSIGN_OR_RETURN(const CheckpointManifest manifest,
                               ReshardCheckpoint(tensors.get(), options_.shards, options_.out));
    Report(JoinPath(options_.out, ManifestName(manifest.version())), manifest);
    return absl::OkStatus();
  }

  absl::Status Export(const CheckpointPlace& place) {
    const bool archive = absl::EndsWith(options_.out, ".pt");
    if (!archive && !absl::EndsWith(options_.out, ".safetensors")) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--out ", options_.out, ": must end in .safetensors or, for a TorchScript archive, .pt"));
    }
    CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointTensors> tensors, Choose(place));
    if (!archive) {
      CODISTILL_RETURN_IF_ERROR(WriteWeights(tensors.get(), options_.out));
    } else {
      const std::string source =
          !options_.archive.empty()
              ? options_.archive
              : JoinPath(options_.target, "model", absl::StrCat(place.group, ".pt"));
      if (!FileSystem::Real()->Exists(source)) {
        return absl::NotFoundError(
            absl::StrCat(source, ": no such archive; name the model's with --archive"));
      }
      const std::string weights = absl::StrCat(options_.out, ".", getpid(), ".tmp.safetensors");
      absl::Status status = WriteWeights(tensors.get(), weights);
      if (status.ok()) status = Install(source, weights);
      FileSystem::Real()->RemoveFile(weights).IgnoreError();
      CODISTILL_RETURN_IF_ERROR(status);
    }
    Report(options_.out, tensors->manifest());
    return absl::OkStatus();
  }

  static absl::Status WriteWeights(CheckpointTensors* tensors, const std::string& path) {
    const CheckpointManifest& manifest = tensors->manifest();
    std::vector<SafetensorsItem> items;
    for (int t = 0; t < manifest.shard_map().tensors_size(); ++t) {
      const TensorSpec& spec = manifest.shard_map().tensors(t);
      if (spec.role() == TensorSpec::TIED) continue;
      SafetensorsItem item;
      item.name = spec.name();
      item.dtype = spec.dtype();
      item.shape.assign(spec.shape().begin(), spec.shape().end());
      const int64_t count = ElementCount(item.shape);
      item.read = [tensors, t, count](char* to) { return tensors->Read(t, "", 0, count, to); };
      items.push_back(std::move(item));
    }
    // Wider elements first, so that each tensor is aligned in the file.
    std::stable_sort(items.begin(), items.end(),
                     [](const SafetensorsItem& a, const SafetensorsItem& b) {
                       return ElementSize(a.dtype) > ElementSize(b.dtype);
                     });
    return WriteSafetensors(path, items,
                            {{"format", "pt"},
                             {"job", manifest.job()},
                             {"group", manifest.group()},
                             {"generation", absl::StrCat(manifest.version().generation())},
                             {"step", absl::StrCat(manifest.version().step())}});
  }

  absl::Status Install(const std::string& archive, const std::string& weights) {
    CODISTILL_ASSIGN_OR_RETURN(const std::string exporter, FindExporter(options_.exporter));
    const std::string log = weights + ".log";
    CODISTILL_ASSIGN_OR_RETURN(
        ChildProcess child,
        ChildProcess::Start({options_.python, JoinPath(DirName(exporter), "with_weights.py"),
                             "--archive", archive, "--weights", weights, "--out", options_.out},
                            log));
    const absl::Time deadline = absl::Now() + absl::Minutes(10);
    while (!child.Poll()) {
      if (absl::Now() > deadline) child.Signal(SIGKILL);
      absl::SleepFor(absl::Milliseconds(10));
    }
    absl::Status status;
    if (!child.Poll()->clean()) {
      status = absl::InvalidArgumentError(absl::StrCat(
          "models/with_weights.py ", child.Poll()->ToString(), ":\n", TailOfFile(log, 12)));
    }
    FileSystem::Real()->RemoveFile(log).IgnoreError();
    return status;
  }

  void Report(const std::string& path, const CheckpointManifest& manifest) {
    if (options_.json) {
      *output_ = Json{{"group", manifest.group()},
                      {"generation", manifest.version().generation()},
                      {"step", manifest.version().step()},
                      {"path", path}}
                     .dump(2) +
                 "\n";
    } else {
      *output_ =
          absl::StrCat(manifest.group(), ": step ", manifest.version().step(), " -> ", path, "\n");
    }
  }

  const CheckpointCommandOptions& options_;
  std::string* const output_;
  bool* const damaged_;
};

}  // namespace

absl::StatusOr<std::vector<CheckpointPlace>> FindCheckpoints(const std::string& target,
                                                             const std::string& group) {
  FileSystem* const files = FileSystem::Real();
  std::vector<CheckpointPlace> places;
  if (HasManifests(target)) {
    std::string path = target;
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    places.push_back({BaseName(path), path});
  }
  for (const std::string& parent : {JoinPath(target, "checkpoints"), target}) {
    if (!places.empty() || !files->IsDirectory(parent)) continue;
    CODISTILL_ASSIGN_OR_RETURN(const std::vector<std::string> names, files->ListDir(parent));
    for (const std::string& name : names) {
      const std::string directory = JoinPath(parent, name);
      if (files->IsDirectory(directory) && HasManifests(directory)) {
        places.push_back({name, directory});
      }
    }
  }
  if (places.empty()) {
    return absl::NotFoundError(
        absl::StrCat(target, ": no checkpoints there, nor in its folders or in checkpoints/"));
  }
  if (group.empty()) return places;
  std::vector<std::string> names;
  for (const CheckpointPlace& place : places) {
    if (place.group == group) return std::vector<CheckpointPlace>{place};
    names.push_back(place.group);
  }
  return absl::NotFoundError(absl::StrCat("--group ", group, ": ", target, " has checkpoints of ",
                                          absl::StrJoin(names, ", ")));
}

absl::Status RunCheckpointCommand(const CheckpointCommandOptions& options, std::string* output,
                                  bool* damaged) {
  return Command(options, output, damaged).Run();
}

}  // namespace codistill
