#ifndef CODISTILL_WORKER_TEACHER_LIST_H_
#define CODISTILL_WORKER_TEACHER_LIST_H_

#include <string>
#include <vector>

#include "proto/job.pb.h"
#include "worker/inference_messages.h"

namespace codistill {

// One teacher, the servers that answer for it, and how they are spoken to.
struct TeacherServers {
  std::string name;
  std::vector<std::string> addresses;
  TeacherDialect dialect;
};

// Those that teach `group`, in the job's order; empty without codistillation.
std::vector<TeacherServers> TeacherServersOf(const JobConfig& job, int group);

// As the job describes the servers of somebody else.
TeacherDialect DialectOf(const ModelConfig& model, const TeacherConfig& teacher);

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_LIST_H_
