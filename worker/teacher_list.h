#ifndef CODISTILL_WORKER_TEACHER_LIST_H_
#define CODISTILL_WORKER_TEACHER_LIST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
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

// A batch's predictions travel in one message, whose size is limited (kMaxPredictionBytes in
// common/rpc/channel.h). INVALID_ARGUMENT names the job's fields where a batch of
// `labels_per_example` rows an example would make more than that in an answer of one of the
// teachers of `group`, in the form codistillation.teacher_output and teacher_dtype ask for; FP32
// logits where a teacher is external.
absl::Status CheckAnswerSizes(const JobConfig& job, int group, int64_t labels_per_example);

// As the job describes the servers of somebody else.
TeacherDialect DialectOf(const ModelConfig& model, const TeacherConfig& teacher);

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_LIST_H_
