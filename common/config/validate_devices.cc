// Where processes compute: GroupConfig.devices, prediction_devices, EvaluatorConfig.device. Whether
// a machine has a device, and a program was built for it, is for the process to find out.

#include "absl/strings/str_cat.h"
#include "common/base/device.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

void CheckDevice(const std::string& path, const std::string& device, Mistakes* mistakes) {
  const absl::Status status = ParseDevice(device).status();
  if (!status.ok()) mistakes->Add(path, std::string(status.message()));
}

void CheckList(const std::string& path,
               const google::protobuf::RepeatedPtrField<std::string>& devices, int processes,
               absl::string_view count_field, Mistakes* mistakes) {
  if (devices.size() > 1 && devices.size() != processes) {
    mistakes->Add(path, absl::StrCat("wrong number of devices (", devices.size(), "); ", processes,
                                     ", as ", count_field, " says, or one for all would be right"));
  }
  for (int i = 0; i < devices.size(); ++i) {
    CheckDevice(absl::StrCat(path, "[", i, "]"), devices[i], mistakes);
  }
}

}  // namespace

void CheckGroupDevices(const std::string& path, const GroupConfig& group, Mistakes* mistakes) {
  CheckList(path + ".devices", group.devices(), group.num_workers(), "num_workers", mistakes);
  CheckList(path + ".prediction_devices", group.prediction_devices(),
            group.num_prediction_servers(), "num_prediction_servers", mistakes);
}

void CheckTeacherDevices(const std::string& path, const TeacherConfig& teacher,
                         Mistakes* mistakes) {
  if (teacher.has_external() && !teacher.prediction_devices().empty()) {
    mistakes->Add(path + ".prediction_devices",
                  absl::StrCat("without meaning for an external teacher, whose servers are not the "
                               "job's (",
                               teacher.prediction_devices(0), "); none would be right"));
    return;
  }
  CheckList(path + ".prediction_devices", teacher.prediction_devices(),
            teacher.num_prediction_servers(), "num_prediction_servers", mistakes);
}

void CheckEvaluatorDevice(const EvaluatorConfig& evaluator, Mistakes* mistakes) {
  CheckDevice("evaluator.device", evaluator.device(), mistakes);
}

}  // namespace internal
}  // namespace codistill
