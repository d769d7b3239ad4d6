#include "common/config/teachers.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/optional.h"
#include "common/base/file.h"

namespace codistill {
namespace {

TeacherRef GroupAt(const JobConfig& job, int index) {
  return {TeacherRef::kGroup, job.groups(index).name(), index};
}

// Nothing for a teacher whose source is missing.
absl::optional<TeacherRef> TeacherAt(const JobConfig& job, int index) {
  const TeacherConfig& teacher = job.teachers(index);
  switch (teacher.source_case()) {
    case TeacherConfig::kFrozen:
      return TeacherRef{TeacherRef::kFrozen, teacher.name(), index};
    case TeacherConfig::kEnsemble:
      return TeacherRef{TeacherRef::kEnsemble, teacher.name(), index};
    case TeacherConfig::kExternal:
      return TeacherRef{TeacherRef::kExternal, teacher.name(), index};
    case TeacherConfig::SOURCE_NOT_SET:
      break;
  }
  return absl::nullopt;
}

absl::optional<TeacherRef> ModelNamed(const JobConfig& job, absl::string_view name) {
  for (int i = 0; i < job.groups_size(); ++i) {
    if (job.groups(i).name() == name) return GroupAt(job, i);
  }
  for (int i = 0; i < job.teachers_size(); ++i) {
    if (job.teachers(i).name() == name) return TeacherAt(job, i);
  }
  return absl::nullopt;
}

bool Same(const TeacherRef& a, const TeacherRef& b) {
  return (a.kind == TeacherRef::kGroup) == (b.kind == TeacherRef::kGroup) && a.index == b.index;
}

}  // namespace

absl::StatusOr<TeacherRef> FindModel(const JobConfig& job, absl::string_view name) {
  absl::optional<TeacherRef> model = ModelNamed(job, name);
  if (model) return *std::move(model);
  std::vector<std::string> names;
  for (const GroupConfig& group : job.groups()) names.push_back(group.name());
  for (const TeacherConfig& teacher : job.teachers()) names.push_back(teacher.name());
  return absl::NotFoundError(absl::StrCat("no group or teacher \"", name, "\" in job ", job.name(),
                                          "; there are ", absl::StrJoin(names, ", ")));
}

std::vector<TeacherRef> TeachersOf(const JobConfig& job, int group) {
  std::vector<TeacherRef> teachers;
  if (!job.codistillation().enabled()) return teachers;
  const auto add = [&teachers](absl::optional<TeacherRef> model) {
    if (model) teachers.push_back(*std::move(model));
  };
  if (job.groups(group).teachers_size() > 0) {
    for (const std::string& name : job.groups(group).teachers()) add(ModelNamed(job, name));
    return teachers;
  }
  const int groups = job.groups_size();
  switch (job.codistillation().topology()) {
    case CodistillationConfig::ALL:
      for (int i = 0; i < groups; ++i) {
        if (i != group) add(GroupAt(job, i));
      }
      break;
    case CodistillationConfig::RING:
      if (groups > 1) add(GroupAt(job, (group + 1) % groups));
      break;
  }
  for (int i = 0; i < job.teachers_size(); ++i) add(TeacherAt(job, i));
  return teachers;
}

bool HasTeachers(const JobConfig& job) {
  for (int g = 0; g < job.groups_size(); ++g) {
    if (!TeachersOf(job, g).empty()) return true;
  }
  return false;
}

bool Teaches(const JobConfig& job, const TeacherRef& model) {
  for (int g = 0; g < job.groups_size(); ++g) {
    const std::vector<TeacherRef> teachers = TeachersOf(job, g);
    if (std::any_of(teachers.begin(), teachers.end(),
                    [&model](const TeacherRef& teacher) { return Same(teacher, model); })) {
      return true;
    }
  }
  return false;
}

std::vector<TeacherRef> MembersOf(const JobConfig& job, const TeacherRef& ensemble) {
  std::vector<TeacherRef> members;
  if (ensemble.kind != TeacherRef::kEnsemble) return members;
  for (const std::string& name : job.teachers(ensemble.index).ensemble().members()) {
    absl::optional<TeacherRef> member = ModelNamed(job, name);
    if (member) members.push_back(*std::move(member));
  }
  return members;
}

bool HasGroupTeachers(const JobConfig& job) {
  const auto is_group = [](const TeacherRef& model) { return model.kind == TeacherRef::kGroup; };
  for (int g = 0; g < job.groups_size(); ++g) {
    for (const TeacherRef& teacher : TeachersOf(job, g)) {
      const std::vector<TeacherRef> members = MembersOf(job, teacher);
      if (is_group(teacher) || std::any_of(members.begin(), members.end(), is_group)) return true;
    }
  }
  return false;
}

bool NeedsPredictionServers(const JobConfig& job, const TeacherRef& model) {
  return model.kind != TeacherRef::kExternal &&
         job.codistillation().mode() == CodistillationConfig::PREDICTIONS && Teaches(job, model);
}

int NumPredictionServers(const JobConfig& job, const TeacherRef& model) {
  return model.kind == TeacherRef::kGroup ? job.groups(model.index).num_prediction_servers()
                                          : job.teachers(model.index).num_prediction_servers();
}

const google::protobuf::RepeatedPtrField<Endpoint>& PredictionServersOf(const JobConfig& job,
                                                                        const TeacherRef& model) {
  return model.kind == TeacherRef::kGroup ? job.groups(model.index).prediction_servers()
                                          : job.teachers(model.index).prediction_servers();
}

void ResolveTeacherPaths(const std::string& directory, JobConfig* job) {
  for (TeacherConfig& teacher : *job->mutable_teachers()) {
    if (!teacher.has_frozen()) continue;
    FrozenTeacher* frozen = teacher.mutable_frozen();
    if (!frozen->archive().empty()) frozen->set_archive(JoinPath(directory, frozen->archive()));
    if (!frozen->checkpoint().empty()) {
      frozen->set_checkpoint(JoinPath(directory, frozen->checkpoint()));
    }
  }
}

}  // namespace codistill
