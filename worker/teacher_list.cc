#include "worker/teacher_list.h"

#include <utility>

#include "common/config/teachers.h"

namespace codistill {

TeacherDialect DialectOf(const ModelConfig& model, const TeacherConfig& teacher) {
  TeacherDialect dialect;
  dialect.model = teacher.name();
  if (!teacher.has_external()) return dialect;
  const ExternalTeacher& external = teacher.external();
  if (!external.model().empty()) dialect.model = external.model();
  dialect.version = external.version();
  dialect.output = external.output();
  dialect.probabilities = external.kind() == ExternalTeacher::PROBABILITIES;
  dialect.codistill_server = external.codistill_server();
  for (const ModelInput& input : model.inputs()) {
    std::string name = input.name();
    for (const ExternalTeacher::InputName& mapped : external.inputs()) {
      if (mapped.input() == input.name()) name = mapped.server();
    }
    dialect.inputs.push_back(std::move(name));
  }
  return dialect;
}

std::vector<TeacherServers> TeacherServersOf(const JobConfig& job, int group) {
  std::vector<TeacherServers> teachers;
  for (const TeacherRef& ref : TeachersOf(job, group)) {
    TeacherServers teacher;
    teacher.name = ref.name;
    teacher.dialect.model = ref.name;
    if (ref.kind == TeacherRef::kExternal) {
      teacher.dialect = DialectOf(job.model(), job.teachers(ref.index));
    }
    for (const Endpoint& endpoint : PredictionServersOf(job, ref)) {
      teacher.addresses.push_back(endpoint.address());
    }
    teachers.push_back(std::move(teacher));
  }
  return teachers;
}

}  // namespace codistill
