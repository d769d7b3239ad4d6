#ifndef CODISTILL_COMMON_CONFIG_DEVICES_H_
#define CODISTILL_COMMON_CONFIG_DEVICES_H_

#include <string>

#include "common/config/teachers.h"
#include "proto/job.pb.h"

// Where the processes of a job compute: "cpu" or "cuda:N" (common/base/device.h). A list has one
// entry for all, or one a process; without a list it is the CPU.
namespace codistill {

std::string WorkerDevice(const JobConfig& job, int group, int index);

// Of a group's or teacher's prediction server; "cpu" for an external teacher.
std::string PredictionDevice(const JobConfig& job, const TeacherRef& model, int index);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_DEVICES_H_
