#include "predserver/server_plan.h"

#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/device.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/devices.h"
#include "common/config/job.h"
#include "common/config/teachers.h"
#include "common/config/text_proto.h"
#include "common/model/inputs.h"
#include "common/model/job_models.h"
#include "common/tensor/tensor.h"

namespace codistill {
namespace {

constexpr size_t kMaxModelFileBytes = 1 << 20;
constexpr int kMaxSpinUs = 100000;

// What is wrong with the flags as such, whatever the files say.
absl::Status CheckFlags(const ServerFlags& flags) {
  ErrorList errors;
  const int kinds = !flags.group.empty() + !flags.teacher.empty() + !flags.archive.empty();
  if (kinds != 1) {
    errors.Add(kinds == 0 ? "nothing to serve; --group, --teacher or --archive would be right"
                          : "only one of --group, --teacher and --archive can be given");
  }
  if (flags.job.empty() && (!flags.group.empty() || !flags.teacher.empty())) {
    errors.Add("--job", "missing; --group and --teacher are names in a job");
  }
  if (!flags.archive.empty() && flags.job.empty() && flags.model.empty()) {
    errors.Add("--model",
               "missing; a file with the model's inputs and num_outputs (a text proto of "
               "ModelConfig), or a --job with the same model, would be right");
  }
  if (!flags.model.empty() && !flags.job.empty()) {
    errors.Add("--model", "the job has a model already; one of --job and --model would be right");
  }
  if (flags.archive.empty()) {
    const auto only_archive = [&errors](const char* flag, bool given) {
      if (given) errors.Add(flag, "goes with --archive only");
    };
    only_archive("--checkpoint", !flags.checkpoint.empty());
    only_archive("--follow", flags.follow);
    only_archive("--name", !flags.name.empty());
    only_archive("--model", !flags.model.empty());
  } else if (flags.follow && flags.checkpoint.empty()) {
    errors.Add("--follow", "needs --checkpoint, the directory to look at");
  }
  if (flags.index < 0) errors.Add("--index", absl::StrCat(flags.index, "; counted from 0"));
  const DataType weights = DataTypeFromName(flags.weights);
  if (!flags.weights.empty() && weights != DT_FLOAT && weights != DT_BFLOAT16 &&
      weights != DT_INT8) {
    errors.Add("--weights", absl::StrCat(flags.weights, "; FP32, BF16 or INT8 would be right"));
  }
  if (flags.held_versions < 0) {
    errors.Add("--held_versions", absl::StrCat(flags.held_versions,
                                               "; at least 1, or 0 for what "
                                               "the job says"));
  }
  if (flags.compute_threads < 0) {
    errors.Add("--compute_threads", absl::StrCat(flags.compute_threads,
                                                 "; at least 1, or 0 for "
                                                 "what the job says"));
  }
  if (flags.spin_us < 0 || flags.spin_us > kMaxSpinUs) {
    errors.Add("--spin_us", absl::StrCat(flags.spin_us, "; from 0 (never) to ", kMaxSpinUs));
  }
  const absl::Status device = ParseDevice(flags.device).status();
  if (!flags.device.empty() && !device.ok()) {
    errors.Add("--device", std::string(device.message()));
  }
  if (!flags.precision.empty() && flags.precision != "FP32" && flags.precision != "BF16") {
    errors.Add("--precision", absl::StrCat(flags.precision, "; FP32 or BF16 would be right"));
  }
  return errors.ToStatus();
}

std::vector<std::string> ModelNames(const ServerFlags& flags) {
  if (flags.group.empty()) return {flags.teacher};
  std::vector<std::string> names;
  for (absl::string_view name : absl::StrSplit(flags.group, ',')) {
    names.emplace_back(absl::StripAsciiWhitespace(name));
  }
  return names;
}

// The place of this server among those of a model.
absl::Status CheckIndex(const JobConfig& job, const TeacherRef& model, int index) {
  const int servers = NumPredictionServers(job, model);
  if (index < servers) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "--index ", index, ": ", model.kind == TeacherRef::kGroup ? "group " : "teacher ", model.name,
      " has ", servers, " prediction servers, counted from 0"));
}

absl::Status PlanJobModels(const ServerFlags& flags, ServerPlan* plan) {
  ErrorList errors;
  const bool groups = !flags.group.empty();
  std::set<std::string> addresses;
  std::set<std::string> devices;
  for (const std::string& name : ModelNames(flags)) {
    const absl::StatusOr<TeacherRef> model = FindModel(plan->job, name);
    if (!model.ok()) {
      errors.Add(model.status());
      continue;
    }
    if (groups != (model->kind == TeacherRef::kGroup)) {
      errors.Add(absl::StrCat(groups ? "--group " : "--teacher ", name, ": is a ",
                              groups ? "teacher; --teacher" : "group; --group", " would be right"));
    } else if (model->kind == TeacherRef::kExternal) {
      errors.Add(
          absl::StrCat("--teacher ", name, ": is external: its servers are somebody else's"));
    }
    errors.Add(CheckIndex(plan->job, *model, flags.index));
    for (const std::string& other : plan->names) {
      if (other == name) errors.Add(absl::StrCat("--group: ", name, " is named twice"));
    }
    plan->names.push_back(name);
    plan->device = PredictionDevice(plan->job, *model, flags.index);
    devices.insert(plan->device);
    const auto& servers = PredictionServersOf(plan->job, *model);
    if (flags.index >= servers.size()) continue;
    if (!servers[flags.index].address().empty()) addresses.insert(servers[flags.index].address());
    if (plan->endpoint.address().empty()) plan->endpoint = servers[flags.index];
  }
  if (addresses.size() > 1) {
    errors.Add(absl::StrCat("the prediction servers ", flags.index, " of ", flags.group,
                            " have several addresses (", absl::StrJoin(addresses, ", "),
                            "); one process has one"));
  }
  if (devices.size() > 1 && flags.device.empty()) {
    errors.Add(absl::StrCat("the prediction servers ", flags.index, " of ", flags.group,
                            " have several devices (", absl::StrJoin(devices, ", "),
                            "); one process has one, which --device can say"));
  }
  plan->group = absl::StrJoin(plan->names, ",");
  return errors.ToStatus();
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& path) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxModelFileBytes));
  ModelConfig config;
  ErrorList errors;
  for (const TextProtoError& error : ParseTextProto(text, &config)) errors.Add(error.ToString());
  CODISTILL_RETURN_IF_ERROR(errors.ToStatus(absl::StrCat(path, ":")));
  CODISTILL_RETURN_IF_ERROR(Annotate(CheckModelConfig(config), path));
  return config;
}

// A frozen teacher that stands in no job file becomes one of the plan's job.
absl::Status PlanArchive(const ServerFlags& flags, ServerPlan* plan) {
  if (!flags.model.empty()) {
    CODISTILL_ASSIGN_OR_RETURN(*plan->job.mutable_model(), LoadModelConfig(flags.model));
  }
  std::string name = flags.name;
  if (name.empty()) name = std::string(absl::StripSuffix(BaseName(flags.archive), ".pt"));
  if (plan->job.name().empty()) plan->job.set_name(name);
  plan->job.clear_groups();
  plan->job.clear_teachers();
  TeacherConfig* const teacher = plan->job.add_teachers();
  teacher->set_name(name);
  teacher->mutable_frozen()->set_archive(flags.archive);
  teacher->mutable_frozen()->set_checkpoint(flags.checkpoint);
  teacher->mutable_frozen()->set_follow(flags.follow);
  plan->names = {name};
  plan->group = name;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ServerPlan> PlanServer(const ServerFlags& flags) {
  CODISTILL_RETURN_IF_ERROR(CheckFlags(flags));
  ServerPlan plan;
  plan.index = flags.index;
  plan.optimize_passes = flags.optimize_passes;
  if (!flags.job.empty()) {
    CODISTILL_ASSIGN_OR_RETURN(plan.job, LoadJob(flags.job));
  }
  CODISTILL_RETURN_IF_ERROR(flags.archive.empty() ? PlanJobModels(flags, &plan)
                                                  : PlanArchive(flags, &plan));
  PredictionConfig* const prediction = plan.job.mutable_prediction();
  if (!flags.weights.empty()) prediction->set_weights(DataTypeFromName(flags.weights));
  if (flags.held_versions > 0) prediction->set_held_versions(flags.held_versions);
  if (!flags.precision.empty()) prediction->set_precision(flags.precision == "BF16" ? BF16 : FP32);
  if (!flags.device.empty()) plan.device = flags.device;
  if (flags.compute_threads > 0) prediction->set_compute_threads(flags.compute_threads);
  return plan;
}

absl::StatusOr<std::vector<ServedModel>> OpenModels(const ServerPlan& plan) {
  const PredictionConfig& prediction = plan.job.prediction();
  JobModels::Options options;
  options.job = plan.job;
  options.threads = prediction.threads();
  options.transfer_dtype = prediction.transfer_dtype();
  options.weights = prediction.weights();
  options.held_versions = prediction.held_versions();
  options.low_priority = true;  // requests come first
  // What libtorch optimises for a GPU it compiles anew for each size of batch, and what it
  // optimises it computes in fp32.
  options.optimize_predict =
      plan.optimize_passes && plan.device == "cpu" && prediction.precision() == FP32;
  options.device = plan.device;
  options.precision = prediction.precision();
  JobModels of_job(std::move(options));
  std::vector<ServedModel> models;
  for (const std::string& name : plan.names) {
    CODISTILL_ASSIGN_OR_RETURN(const TeacherRef ref, FindModel(plan.job, name));
    ServedModel model;
    model.name = name;
    model.config = plan.job.model();
    CODISTILL_ASSIGN_OR_RETURN(model.followed, of_job.Follow(ref));
    models.push_back(std::move(model));
  }
  return models;
}

}  // namespace codistill
