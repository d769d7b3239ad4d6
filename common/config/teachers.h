// Who teaches whom in a job: groups teach one another, and so do the teachers that no group of the
// job trains (JobConfig.teachers). Pure functions of a job.

#ifndef CODISTILL_COMMON_CONFIG_TEACHERS_H_
#define CODISTILL_COMMON_CONFIG_TEACHERS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "proto/job.pb.h"

namespace codistill {

// A model that answers with predictions: a group, or one of job.teachers.
struct TeacherRef {
  enum Kind { kGroup, kFrozen, kEnsemble, kExternal };
  Kind kind = kGroup;
  std::string name;  // of the model at its prediction servers (but for ExternalTeacher.model)
  int index = 0;     // kGroup: in job.groups; the others: in job.teachers
};

// A group or teacher by name; NOT_FOUND lists what there is.
absl::StatusOr<TeacherRef> FindModel(const JobConfig& job, absl::string_view name);

// Who teaches `group`: GroupConfig.teachers where they are given, else the groups that the topology
// says and then all of job.teachers. Empty when codistillation is off. Names that the job does not
// have, and teachers without a source, are left out (validation reports them).
std::vector<TeacherRef> TeachersOf(const JobConfig& job, int group);

// Whether any group of the job has a teacher.
bool HasTeachers(const JobConfig& job);

// Whether `model` teaches any group of the job by itself; members of an ensemble do not.
bool Teaches(const JobConfig& job, const TeacherRef& model);

// What an ensemble averages; empty for other kinds.
std::vector<TeacherRef> MembersOf(const JobConfig& job, const TeacherRef& ensemble);

// Whether some teacher is a group of this job, or an ensemble with such a member: its predictions
// come from weights that grow stale.
bool HasGroupTeachers(const JobConfig& job);

// Whether training needs prediction servers of `model` that belong to the job: it teaches, it is
// not external, and codistillation.mode is PREDICTIONS. (An ensemble's servers hold its members.)
bool NeedsPredictionServers(const JobConfig& job, const TeacherRef& model);

// How many there are to be, and where they are.
int NumPredictionServers(const JobConfig& job, const TeacherRef& model);
const google::protobuf::RepeatedPtrField<Endpoint>& PredictionServersOf(const JobConfig& job,
                                                                        const TeacherRef& model);

// Makes relative paths of frozen teachers start at `directory`.
void ResolveTeacherPaths(const std::string& directory, JobConfig* job);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_TEACHERS_H_
