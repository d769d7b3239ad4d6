#include "common/config/validate.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/config/teachers.h"

namespace codistill {
namespace internal {

void CheckName(const std::string& path, const std::string& name, Mistakes* mistakes) {
  constexpr size_t kMaxNameLength = 100;
  const bool safe = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.';
  });
  if (name.empty()) {
    mistakes->Add(path, "missing; a name of letters, digits, '-', '_' and '.' would be right");
  } else if (!safe || name[0] == '.' || name[0] == '-') {
    mistakes->Add(path, absl::StrCat("unsafe name (", name,
                                     "); letters, digits, '-', '_' and '.' are allowed, "
                                     "with neither '.' nor '-' at the start"));
  } else if (name.size() > kMaxNameLength) {
    mistakes->Add(path, absl::StrCat("too long a name (", name.size(), " characters); at most ",
                                     kMaxNameLength, " would be right"));
  }
}

namespace {

constexpr int64_t kMaxProcesses = 4096;
constexpr int64_t kMaxPrefetch = 64;

std::string Index(absl::string_view field, int i) { return absl::StrCat(field, "[", i, "]"); }

// Whether two lists may have the same address: those of the prediction servers of two groups.
bool MayShare(const std::string& a, const std::string& b) {
  const auto of_group = [](const std::string& path) {
    return absl::StartsWith(path, "groups[") && absl::EndsWith(path, ".prediction_servers");
  };
  return a != b && of_group(a) && of_group(b);
}

}  // namespace

void CheckAddress(const std::string& path, const std::string& address, Mistakes* mistakes) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 || port > 65535) {
    mistakes->Add(path, absl::StrCat("wrong address (", address,
                                     "); host:port with a port from 1 to 65535 would be right"));
  }
}

void CheckEndpoints(const std::string& path,
                    const google::protobuf::RepeatedPtrField<Endpoint>& endpoints, int processes,
                    absl::string_view count_field, Addresses* addresses, Mistakes* mistakes) {
  if (!endpoints.empty() && endpoints.size() != processes) {
    mistakes->Add(path,
                  absl::StrCat("wrong number of endpoints (", endpoints.size(), "); ", processes,
                               ", as ", count_field, " says, or none would be right"));
  }
  for (int i = 0; i < endpoints.size(); ++i) {
    // Empty: not known yet, while `codistillctl run` starts the daemons one after the other.
    if (endpoints[i].address().empty()) continue;
    const std::string field = absl::StrCat(Index(path, i), ".address");
    CheckAddress(field, endpoints[i].address(), mistakes);
    const auto [used, unused] = addresses->insert({endpoints[i].address(), path});
    if (!unused && !MayShare(used->second, path)) {
      mistakes->Add(field, absl::StrCat("used twice (", endpoints[i].address(),
                                        "); one address a process would be right"));
    }
    if (endpoints[i].has_http_address()) {
      CheckAddress(absl::StrCat(Index(path, i), ".http_address"), endpoints[i].http_address(),
                   mistakes);
    }
  }
}

namespace {

void CheckModel(const JobConfig& job, Mistakes* mistakes) {
  if (!job.has_model()) {
    mistakes->Add("model", "missing; a message with export, inputs and num_outputs would be right");
    return;
  }
  const ModelConfig& model = job.model();
  if (model.has_export_() == model.has_archive_dir()) {
    mistakes->Add("model", absl::StrCat(model.has_export_() ? "both export and archive_dir"
                                                            : "neither export nor archive_dir",
                                        " given; exactly one of the two would be right"));
  }
  if (model.has_export_()) {
    mistakes->Required("model.export.module", !model.export_().module().empty(),
                       "mlp, ctr, resnet, lstm_lm or the path of a Python file");
    std::set<std::string> keys;
    for (int i = 0; i < model.export_().options_size(); ++i) {
      const std::string& key = model.export_().options(i).key();
      const std::string path = absl::StrCat(Index("model.export.options", i), ".key");
      mistakes->Required(path, !key.empty(), "the name of an option of the module");
      if (!key.empty() && !keys.insert(key).second) {
        mistakes->Add(path, absl::StrCat("given twice (", key, "); once would be right"));
      }
    }
  }
  if (model.has_archive_dir()) {
    mistakes->Required("model.archive_dir", !model.archive_dir().empty(), "a directory");
  }
  mistakes->Required("model.inputs", model.inputs_size() > 0, "the arguments of forward()");
  std::set<std::string> names;
  for (int i = 0; i < model.inputs_size(); ++i) {
    const ModelInput& input = model.inputs(i);
    const std::string path = Index("model.inputs", i);
    mistakes->Required(absl::StrCat(path, ".name"), !input.name().empty(),
                       "a field of the data's batches");
    if (!input.name().empty() && !names.insert(input.name()).second) {
      mistakes->Add(absl::StrCat(path, ".name"),
                    absl::StrCat("used twice (", input.name(), "); unique names would be right"));
    }
  }
  for (int i = 0; i < model.states_size(); ++i) {
    const RecurrentState& state = model.states(i);
    const std::string path = Index("model.states", i);
    mistakes->Required(absl::StrCat(path, ".name"), !state.name().empty(),
                       "the name of an argument of forward()");
    if (!state.name().empty() && !names.insert(state.name()).second) {
      mistakes->Add(absl::StrCat(path, ".name"),
                    absl::StrCat("used twice (", state.name(), "); unique names would be right"));
    }
    int batch_dimensions = 0;
    bool valid = true;
    for (const int64_t dimension : state.shape()) {
      if (dimension == -1)
        ++batch_dimensions;
      else if (dimension < 1)
        valid = false;
    }
    if (batch_dimensions != 1 || !valid) {
      mistakes->Add(absl::StrCat(path, ".shape"),
                    "wrong shape; positive sizes and one -1 for the batch would be right, such as "
                    "[2, -1, 256]");
    }
  }
  mistakes->Required("model.num_outputs", model.has_num_outputs(),
                     "the number of columns of the logits");
  if (model.has_num_outputs()) {
    const bool softmax = model.label_loss() == SOFTMAX_CROSS_ENTROPY;
    if (softmax ? model.num_outputs() < 2 : model.num_outputs() != 1) {
      mistakes->Add("model.num_outputs",
                    absl::StrCat("does not fit label_loss ", LabelLoss_Name(model.label_loss()),
                                 " (", model.num_outputs(), "); ", softmax ? "at least 2" : "1",
                                 " would be right"));
    }
  }
  mistakes->Fraction("model.label_smoothing", model.label_smoothing());
  if (model.label_smoothing() != 0 && model.label_loss() != SOFTMAX_CROSS_ENTROPY) {
    mistakes->Add("model.label_smoothing",
                  absl::StrCat("not possible with label_loss ", LabelLoss_Name(model.label_loss()),
                               " (", model.label_smoothing(), "); 0 would be right"));
  }
  if (model.label_smoothing_prior() != ModelConfig::UNIFORM && !(model.label_smoothing() > 0)) {
    mistakes->Add("model.label_smoothing_prior",
                  absl::StrCat("without effect (",
                               ModelConfig::LabelPrior_Name(model.label_smoothing_prior()),
                               "): nothing is smoothed; a label_smoothing above 0 would be right"));
  }
  if (model.has_ignored_label() && model.label_loss() != SOFTMAX_CROSS_ENTROPY) {
    mistakes->Add(
        "model.ignored_label",
        absl::StrCat("not possible with label_loss ", LabelLoss_Name(model.label_loss()), " (",
                     model.ignored_label(), "), whose labels are no classes; none would be right"));
  }
}

void CheckGroups(const JobConfig& job, Addresses* addresses, Mistakes* mistakes) {
  mistakes->Required("groups", job.groups_size() > 0, "one group or more");
  std::set<std::string> names;
  for (int i = 0; i < job.groups_size(); ++i) {
    const GroupConfig& group = job.groups(i);
    const std::string path = Index("groups", i);
    CheckName(absl::StrCat(path, ".name"), group.name(), mistakes);
    if (!group.name().empty() && !names.insert(group.name()).second) {
      mistakes->Add(absl::StrCat(path, ".name"),
                    absl::StrCat("used twice (", group.name(), "); unique names would be right"));
    }
    mistakes->Between(absl::StrCat(path, ".num_shards"), group.num_shards(), 1, kMaxProcesses);
    mistakes->Between(absl::StrCat(path, ".num_workers"), group.num_workers(), 1, kMaxProcesses);
    mistakes->Between(absl::StrCat(path, ".num_prediction_servers"), group.num_prediction_servers(),
                      NeedsPredictionServers(job, {TeacherRef::kGroup, group.name(), i}) ? 1 : 0,
                      kMaxProcesses);
    CheckEndpoints(absl::StrCat(path, ".shards"), group.shards(), group.num_shards(), "num_shards",
                   addresses, mistakes);
    CheckEndpoints(absl::StrCat(path, ".prediction_servers"), group.prediction_servers(),
                   group.num_prediction_servers(), "num_prediction_servers", addresses, mistakes);
    if (group.has_warm_start()) {
      mistakes->Required(absl::StrCat(path, ".warm_start"), !group.warm_start().empty(),
                         "the path of a safetensors file");
    }
    CheckGroupDevices(path, group, mistakes);
  }
}

void CheckTraining(const JobConfig& job, Mistakes* mistakes) {
  const TrainingConfig& training = job.training();
  if (training.update_mode() == TrainingConfig::BOUNDED_STALENESS) {
    mistakes->Required("training.max_staleness", training.has_max_staleness(),
                       "the steps a worker may be ahead of the slowest in BOUNDED_STALENESS");
    if (training.has_max_staleness()) {
      mistakes->AtLeast("training.max_staleness", training.max_staleness(), 0);
    }
  } else if (training.has_max_staleness()) {
    mistakes->Add("training.max_staleness",
                  absl::StrCat("given (", training.max_staleness(), ") with update_mode ",
                               TrainingConfig::UpdateMode_Name(training.update_mode()),
                               "; it belongs to BOUNDED_STALENESS"));
  }
  CheckMembership(job, mistakes);
  for (int i = 0; i < job.groups_size(); ++i) {
    // Ranges of examples go to whoever asks first, so a worker would meet other lanes every step.
    if (training.update_mode() != TrainingConfig::SYNC && job.model().states_size() > 0 &&
        job.groups(i).num_workers() > 1) {
      mistakes->Add(Index("groups", i) + ".num_workers",
                    absl::StrCat("recurrent state cannot be carried by several ASYNC workers (",
                                 job.groups(i).num_workers(),
                                 "); 1, or training.update_mode: SYNC, would be right"));
    }
  }
  mistakes->Required("training.batch_size", training.has_batch_size(),
                     "the number of examples a worker takes into one step");
  if (training.has_batch_size()) {
    mistakes->AtLeast("training.batch_size", training.batch_size(), 1);
  }
  CheckCompute(job, mistakes);
  CheckOptimizer(training, mistakes);
  mistakes->Positive("training.rejoin_timeout_s", training.rejoin_timeout_s());
  mistakes->AtLeast("training.publish_every_steps", training.publish_every_steps(), 1);
  mistakes->AtLeast("training.held_cuts", training.held_cuts(), 1);
  mistakes->AtLeast("training.log_every_steps", training.log_every_steps(), 1);
  mistakes->Between("training.worker_threads", training.worker_threads(), 1, kMaxProcesses);
  mistakes->Between("training.server_threads", training.server_threads(), 1, kMaxProcesses);
}

// What teachers are asked for: codistillation.teacher_output, top_k and teacher_dtype.
void CheckTeacherOutput(const JobConfig& job, Mistakes* mistakes) {
  const CodistillationConfig& codistillation = job.codistillation();
  const std::string path = "codistillation.";
  const bool top_k = codistillation.teacher_output() == CodistillationConfig::TOP_K;
  const DataType dtype = codistillation.teacher_dtype();
  if (dtype != DT_FLOAT && dtype != DT_HALF && dtype != DT_BFLOAT16 && dtype != DT_INT8) {
    mistakes->Add(path + "teacher_dtype",
                  absl::StrCat("is ", DataType_Name(dtype),
                               "; DT_FLOAT, DT_HALF, DT_BFLOAT16 or DT_INT8 is right"));
  } else if (top_k && dtype == DT_INT8) {
    mistakes->Add(path + "teacher_dtype",
                  "is DT_INT8, which logits have a scale for, with teacher_output TOP_K; DT_FLOAT, "
                  "DT_HALF or DT_BFLOAT16 would be right");
  }
  // With mode CHECKPOINTS nobody is asked, of which CheckTeachers tells.
  if (!top_k || codistillation.mode() == CodistillationConfig::CHECKPOINTS) return;
  if (codistillation.top_k() < 1 ||
      (job.model().num_outputs() > 0 && codistillation.top_k() > job.model().num_outputs())) {
    mistakes->Add(path + "top_k",
                  absl::StrCat("out of range (", codistillation.top_k(), "); 1 to the ",
                               job.model().num_outputs(), " of model.num_outputs would be right"));
  }
  const std::string top_k_path = path + "teacher_output";
  if (job.model().label_loss() != SOFTMAX_CROSS_ENTROPY) {
    mistakes->Add(top_k_path, absl::StrCat("is TOP_K, and a model of label_loss ",
                                           LabelLoss_Name(job.model().label_loss()),
                                           " has no classes that exclude one another; ALL_LOGITS "
                                           "would be right"));
    return;
  }
  if (codistillation.teacher_loss() != CodistillationConfig::SOFT_CROSS_ENTROPY &&
      codistillation.teacher_loss() != CodistillationConfig::KL_TEACHER_STUDENT) {
    mistakes->Add(
        path + "teacher_loss",
        absl::StrCat("needs what teachers say of every class (",
                     CodistillationConfig::TeacherLoss_Name(codistillation.teacher_loss()),
                     "), and with teacher_output TOP_K they name a few; SOFT_CROSS_ENTROPY or "
                     "KL_TEACHER_STUDENT would be right"));
  }
  if (codistillation.average() != CodistillationConfig::PROBABILITIES) {
    mistakes->Add(path + "average",
                  "is LOGITS, which teachers do not give with teacher_output TOP_K; PROBABILITIES "
                  "would be right");
  }
}

void CheckCodistillation(const JobConfig& job, Mistakes* mistakes) {
  const CodistillationConfig& codistillation = job.codistillation();
  const std::string path = "codistillation.";
  mistakes->AtLeast(path + "burn_in_steps", codistillation.burn_in_steps(), 0);
  mistakes->NotNegative(path + "weight", codistillation.weight());
  mistakes->AtLeast(path + "ramp_steps", codistillation.ramp_steps(), 0);
  mistakes->Positive(path + "temperature", codistillation.temperature());
  mistakes->AtLeast(path + "max_staleness_steps", codistillation.max_staleness_steps(), 0);
  mistakes->Between(path + "prefetch", codistillation.prefetch(), 1, kMaxPrefetch);
  mistakes->AtLeast(path + "teacher_wait_ms", codistillation.teacher_wait_ms(), 0);
  mistakes->AtLeast(path + "request_timeout_ms", codistillation.request_timeout_ms(), 1);
  mistakes->AtLeast(path + "hedge_after_ms", codistillation.hedge_after_ms(), 0);
  CheckTeacherOutput(job, mistakes);
  if (!HasTeachers(job)) return;

  // In ASYNC a worker counts burn-in by its own steps, of which the group's are the sum.
  int64_t most_workers = 1;
  for (const GroupConfig& group : job.groups()) {
    most_workers = std::max<int64_t>(most_workers, group.num_workers());
  }
  const bool async = job.training().update_mode() != TrainingConfig::SYNC;
  const int64_t own_steps = job.stop().steps() / (async ? most_workers : 1);
  if (async && job.stop().steps() > 0 && codistillation.burn_in_steps() >= own_steps &&
      codistillation.burn_in_steps() < job.stop().steps()) {
    mistakes->Add(
        path + "burn_in_steps",
        absl::StrCat("no step would use a teacher (", codistillation.burn_in_steps(),
                     "): ASYNC counts each worker's own steps; fewer than the ", own_steps,
                     " of a worker (stop.steps / num_workers) would be right"));
  } else if (job.stop().steps() > 0 && codistillation.burn_in_steps() >= job.stop().steps()) {
    mistakes->Add(path + "burn_in_steps",
                  absl::StrCat("no step would use a teacher (", codistillation.burn_in_steps(),
                               "); fewer than the ", job.stop().steps(),
                               " of stop.steps, or codistillation.enabled: false, would be right"));
  }
  if (HasGroupTeachers(job) && codistillation.max_staleness_steps() >= 0 &&
      codistillation.max_staleness_steps() < job.training().publish_every_steps()) {
    mistakes->Add(
        path + "max_staleness_steps",
        absl::StrCat("predictions would mostly be too old (", codistillation.max_staleness_steps(),
                     "); at least the ", job.training().publish_every_steps(),
                     " of training.publish_every_steps would be right"));
  }
  if (job.model().label_loss() == SQUARED_ERROR &&
      codistillation.teacher_loss() != CodistillationConfig::SQUARED_ERROR_LOGITS) {
    mistakes->Add(
        path + "teacher_loss",
        absl::StrCat("needs probabilities, which a model of label_loss SQUARED_ERROR does "
                     "not give (",
                     CodistillationConfig::TeacherLoss_Name(codistillation.teacher_loss()),
                     "); SQUARED_ERROR_LOGITS would be right"));
  }
}

void CheckTheRest(const JobConfig& job, Mistakes* mistakes) {
  const int64_t every = job.evaluation().every_steps();
  const int64_t publish = job.training().publish_every_steps();
  mistakes->AtLeast("evaluation.every_steps", every, 0);
  if (every > 0 && publish > 0 && every % publish != 0) {
    mistakes->Add("evaluation.every_steps",
                  absl::StrCat("not a published step (", every, "); a multiple of the ", publish,
                               " of training.publish_every_steps would be right"));
  }
  mistakes->AtLeast("evaluation.max_examples", job.evaluation().max_examples(), 0);
  mistakes->AtLeast("evaluation.batch_size", job.evaluation().batch_size(), 1);
  mistakes->AtLeast("checkpoint.every_steps", job.checkpoint().every_steps(), 0);
  mistakes->AtLeast("checkpoint.keep", job.checkpoint().keep(), 1);
  mistakes->NotNegative("checkpoint.max_age_s", job.checkpoint().max_age_s());
  CheckPrediction(job, mistakes);
  const DataType push = job.transport().push_dtype();
  if (push != DT_FLOAT && push != DT_HALF) {
    mistakes->Add("transport.push_dtype",
                  absl::StrCat("is ", DataType_Name(push), "; DT_FLOAT or DT_HALF is right"));
  }
  mistakes->Required("stop.steps", job.stop().has_steps(), "the number of steps of each group");
  if (job.stop().has_steps()) mistakes->AtLeast("stop.steps", job.stop().steps(), 1);
  CheckEvaluatorDevice(job.evaluator(), mistakes);
}

}  // namespace

bool IsWithin(absl::string_view path, absl::string_view field) {
  return path == field || (absl::StartsWith(path, field) && path.size() > field.size() &&
                           (path[field.size()] == '.' || path[field.size()] == '['));
}

bool Mistakes::HasWithin(const std::string& path) const {
  return std::any_of(mistakes_.begin(), mistakes_.end(),
                     [&path](const Mistake& mistake) { return IsWithin(mistake.path, path); });
}

void Mistakes::AtLeast(const std::string& path, int64_t value, int64_t minimum) {
  if (value >= minimum) return;
  Add(path, absl::StrCat("too small (", value, "); at least ", minimum, " would be right"));
}

void Mistakes::Between(const std::string& path, int64_t value, int64_t minimum, int64_t maximum) {
  if (value >= minimum && value <= maximum) return;
  Add(path,
      absl::StrCat("out of range (", value, "); ", minimum, " to ", maximum, " would be right"));
}

void Mistakes::Positive(const std::string& path, double value) {
  if (std::isfinite(value) && value > 0) return;
  Add(path, absl::StrCat("out of range (", value, "); a number greater than 0 would be right"));
}

void Mistakes::NotNegative(const std::string& path, double value) {
  if (std::isfinite(value) && value >= 0) return;
  Add(path, absl::StrCat("out of range (", value, "); 0 or more would be right"));
}

void Mistakes::Fraction(const std::string& path, double value) {
  if (value >= 0 && value < 1) return;
  Add(path, absl::StrCat("out of range (", value, "); at least 0 and less than 1 would be right"));
}

void Mistakes::Required(const std::string& path, bool present, absl::string_view what) {
  if (!present) Add(path, absl::StrCat("missing; ", what, " would be right"));
}

std::vector<Mistake> FindMistakes(const JobConfig& job) {
  Mistakes mistakes;
  CheckName("name", job.name(), &mistakes);
  if (job.has_run_id()) {
    mistakes.Required("run_id", !job.run_id().empty(), "any text, or no run_id at all,");
  }
  CheckModel(job, &mistakes);
  CheckData(job, &mistakes);
  CheckModelInputs(job, &mistakes);
  CheckEmbeddingTables(job, &mistakes);
  Addresses addresses;
  CheckGroups(job, &addresses, &mistakes);
  CheckTeachers(job, &addresses, &mistakes);
  CheckTraining(job, &mistakes);
  CheckCodistillation(job, &mistakes);
  CheckTheRest(job, &mistakes);
  return mistakes.Take();
}

}  // namespace internal
}  // namespace codistill
