// Who teaches whom: JobConfig.teachers, GroupConfig.teachers, and what codistillation.mode asks of
// them.

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/config/teachers.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

constexpr int kMaxProcesses = 4096;

std::string Index(absl::string_view field, int i) { return absl::StrCat(field, "[", i, "]"); }

std::string OrNone(const std::vector<std::string>& names) {
  return names.empty() ? "none" : absl::StrJoin(names, ", ");
}

std::string PathOf(const TeacherRef& model) {
  return Index(model.kind == TeacherRef::kGroup ? "groups" : "teachers", model.index);
}

// A list of names, each of which must be one of `allowed`, once.
void CheckNames(const std::string& path,
                const google::protobuf::RepeatedPtrField<std::string>& names,
                const std::vector<std::string>& allowed, absl::string_view meaning,
                Mistakes* mistakes) {
  std::set<std::string> used;
  for (int i = 0; i < names.size(); ++i) {
    const std::string& name = names[i];
    if (!used.insert(name).second) {
      mistakes->Add(Index(path, i), absl::StrCat("used twice (", name, "); once would be right"));
    } else if (std::find(allowed.begin(), allowed.end(), name) == allowed.end()) {
      mistakes->Add(Index(path, i), absl::StrCat("is not ", meaning, " (", name, "); one of ",
                                                 OrNone(allowed), " would be right"));
    }
  }
}

// GroupConfig.teachers: other groups and job.teachers.
void CheckListOfGroup(const JobConfig& job, int g, Mistakes* mistakes) {
  std::vector<std::string> allowed;
  for (int i = 0; i < job.groups_size(); ++i) {
    if (i != g) allowed.push_back(job.groups(i).name());
  }
  for (const TeacherConfig& teacher : job.teachers()) allowed.push_back(teacher.name());
  CheckNames(absl::StrCat(Index("groups", g), ".teachers"), job.groups(g).teachers(), allowed,
             "another group or a teacher of the job", mistakes);
}

void CheckFrozen(const JobConfig& job, const std::string& path, const FrozenTeacher& frozen,
                 Mistakes* mistakes) {
  mistakes->Required(path + ".archive", !frozen.archive().empty(),
                     "the path of a TorchScript archive");
  if (frozen.follow() && frozen.checkpoint().empty()) {
    mistakes->Add(path + ".follow",
                  "there is nothing to follow (true without checkpoint); a directory of "
                  "checkpoints in `checkpoint`, or false, would be right");
  }
  if (job.model().embedding_tables_size() > 0 && frozen.checkpoint().empty()) {
    mistakes->Add(path + ".checkpoint",
                  "missing, and an archive has no rows of embedding tables; a group's directory "
                  "of checkpoints would be right");
  }
}

void CheckEnsemble(const JobConfig& job, const std::string& path, const EnsembleTeacher& ensemble,
                   Mistakes* mistakes) {
  std::vector<std::string> allowed;
  for (const GroupConfig& group : job.groups()) allowed.push_back(group.name());
  for (const TeacherConfig& teacher : job.teachers()) {
    if (teacher.has_frozen()) allowed.push_back(teacher.name());
  }
  CheckNames(path + ".members", ensemble.members(), allowed, "a group or a frozen teacher",
             mistakes);
  if (ensemble.members_size() < 2) {
    mistakes->Add(path + ".members",
                  absl::StrCat("too few (", ensemble.members_size(), "); two or more of ",
                               OrNone(allowed), " would be right"));
  }
  if (job.model().states_size() > 0) {
    mistakes->Add(
        path, absl::StrCat("not with recurrent state (model.states has ", job.model().states_size(),
                           "): each member would need its own; the members as teachers "
                           "by themselves, whom the loss averages, would be right"));
  }
  if (job.model().label_loss() == SQUARED_ERROR &&
      ensemble.average() == CodistillationConfig::PROBABILITIES) {
    mistakes->Add(path + ".average",
                  "a model of label_loss SQUARED_ERROR gives no probabilities (PROBABILITIES); "
                  "LOGITS would be right");
  }
}

void CheckExternal(const JobConfig& job, const std::string& path, const TeacherConfig& teacher,
                   Mistakes* mistakes) {
  const ExternalTeacher& external = teacher.external();
  if (teacher.prediction_servers().empty()) {
    mistakes->Add(path + ".prediction_servers",
                  "missing; the addresses of the servers that have this model would be right");
  }
  if (teacher.has_num_prediction_servers()) {
    mistakes->Add(path + ".num_prediction_servers",
                  absl::StrCat("without meaning for an external teacher, whose servers are not the "
                               "job's (",
                               teacher.num_prediction_servers(),
                               "); prediction_servers alone would be right"));
  }
  std::set<std::string> addresses;
  for (int i = 0; i < teacher.prediction_servers_size(); ++i) {
    const std::string& address = teacher.prediction_servers(i).address();
    const std::string field = Index(path + ".prediction_servers", i) + ".address";
    CheckAddress(field, address, mistakes);
    if (!addresses.insert(address).second) {
      mistakes->Add(field, absl::StrCat("used twice (", address, "); once would be right"));
    }
  }
  std::vector<std::string> inputs;
  for (const ModelInput& input : job.model().inputs()) inputs.push_back(input.name());
  std::set<std::string> here;
  std::set<std::string> there;
  for (int i = 0; i < external.inputs_size(); ++i) {
    const ExternalTeacher::InputName& name = external.inputs(i);
    const std::string field = Index(path + ".external.inputs", i);
    if (std::find(inputs.begin(), inputs.end(), name.input()) == inputs.end()) {
      mistakes->Add(field + ".input",
                    absl::StrCat("is no input of the model (", name.input(), "); one of ",
                                 OrNone(inputs), " would be right"));
    } else if (!here.insert(name.input()).second) {
      mistakes->Add(field + ".input",
                    absl::StrCat("used twice (", name.input(), "); once would be right"));
    }
    mistakes->Required(field + ".server", !name.server().empty(),
                       "the name of that input at the server");
    if (!name.server().empty() && !there.insert(name.server()).second) {
      mistakes->Add(field + ".server",
                    absl::StrCat("used twice (", name.server(), "); once would be right"));
    }
  }
  mistakes->Required(path + ".external.output", !external.output().empty(),
                     "the name of the server's output to use");
  if (external.kind() == ExternalTeacher::PROBABILITIES &&
      job.model().label_loss() == SQUARED_ERROR) {
    mistakes->Add(path + ".external.kind",
                  "a model of label_loss SQUARED_ERROR has no probabilities (PROBABILITIES); "
                  "LOGITS would be right");
  }
}

// Every worker follows its teachers itself.
void CheckCheckpointsMode(const JobConfig& job, Mistakes* mistakes) {
  const CodistillationConfig& codistillation = job.codistillation();
  if (codistillation.mode() != CodistillationConfig::CHECKPOINTS) return;
  std::set<std::string> external;
  for (int g = 0; g < job.groups_size(); ++g) {
    for (const TeacherRef& teacher : TeachersOf(job, g)) {
      if (teacher.kind == TeacherRef::kExternal) {
        external.insert(absl::StrCat(PathOf(teacher), " (", teacher.name, ")"));
      }
    }
  }
  if (!external.empty()) {
    mistakes->Add("codistillation.mode",
                  absl::StrCat("workers cannot load the weights of external teachers themselves "
                               "(CHECKPOINTS, with ",
                               absl::StrJoin(external, ", "), "); PREDICTIONS would be right"));
  }
  const auto only_asked = [mistakes](const std::string& field, const std::string& value,
                                     const std::string& fitting) {
    mistakes->Add("codistillation." + field,
                  absl::StrCat("without meaning in mode CHECKPOINTS, where nobody is asked (",
                               value, "); ", fitting, ", or mode: PREDICTIONS, would be right"));
  };
  if (codistillation.teacher_output() != CodistillationConfig::ALL_LOGITS) {
    only_asked("teacher_output",
               CodistillationConfig::TeacherOutput_Name(codistillation.teacher_output()),
               "ALL_LOGITS");
  }
  if (codistillation.teacher_dtype() != DT_FLOAT) {
    only_asked("teacher_dtype", DataType_Name(codistillation.teacher_dtype()), "DT_FLOAT");
  }
  if (codistillation.hedge_after_ms() != 0) {
    only_asked("hedge_after_ms", absl::StrCat(codistillation.hedge_after_ms()), "0");
  }
}

}  // namespace

void CheckTeachers(const JobConfig& job, Addresses* addresses, Mistakes* mistakes) {
  for (int g = 0; g < job.groups_size(); ++g) CheckListOfGroup(job, g, mistakes);
  std::set<std::string> names;
  for (const GroupConfig& group : job.groups()) names.insert(group.name());
  for (int i = 0; i < job.teachers_size(); ++i) {
    const TeacherConfig& teacher = job.teachers(i);
    const std::string path = Index("teachers", i);
    CheckName(path + ".name", teacher.name(), mistakes);
    if (!teacher.name().empty() && !names.insert(teacher.name()).second) {
      mistakes->Add(path + ".name",
                    absl::StrCat("used twice (", teacher.name(),
                                 "); a name unlike that of any group or other teacher would be "
                                 "right"));
    }
    CheckTeacherDevices(path, teacher, mistakes);
    TeacherRef ref{TeacherRef::kExternal, teacher.name(), i};
    switch (teacher.source_case()) {
      case TeacherConfig::kFrozen:
        ref.kind = TeacherRef::kFrozen;
        CheckFrozen(job, path + ".frozen", teacher.frozen(), mistakes);
        break;
      case TeacherConfig::kEnsemble:
        ref.kind = TeacherRef::kEnsemble;
        CheckEnsemble(job, path + ".ensemble", teacher.ensemble(), mistakes);
        break;
      case TeacherConfig::kExternal:
        CheckExternal(job, path, teacher, mistakes);
        continue;
      case TeacherConfig::SOURCE_NOT_SET:
        mistakes->Add(path, "missing source; one of frozen, ensemble and external would be right");
        continue;
    }
    mistakes->Between(path + ".num_prediction_servers", teacher.num_prediction_servers(),
                      NeedsPredictionServers(job, ref) ? 1 : 0, kMaxProcesses);
    CheckEndpoints(path + ".prediction_servers", teacher.prediction_servers(),
                   teacher.num_prediction_servers(), "num_prediction_servers", addresses, mistakes);
  }
  CheckCheckpointsMode(job, mistakes);
}

}  // namespace internal
}  // namespace codistill
