#include "common/config/devices.h"

namespace codistill {
namespace {

std::string DeviceOf(const google::protobuf::RepeatedPtrField<std::string>& devices, int index) {
  if (devices.empty()) return "cpu";
  return devices[index % devices.size()];
}

}  // namespace

std::string WorkerDevice(const JobConfig& job, int group, int index) {
  return DeviceOf(job.groups(group).devices(), index);
}

std::string PredictionDevice(const JobConfig& job, const TeacherRef& model, int index) {
  return model.kind == TeacherRef::kGroup
             ? DeviceOf(job.groups(model.index).prediction_devices(), index)
             : DeviceOf(job.teachers(model.index).prediction_devices(), index);
}

}  // namespace codistill
