// The rules on a job, as data: LoadJob drops what follows from a mistake it has already reported.

#ifndef CODISTILL_COMMON_CONFIG_VALIDATE_H_
#define CODISTILL_COMMON_CONFIG_VALIDATE_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "proto/job.pb.h"

namespace codistill {
namespace internal {

struct Mistake {
  std::string path;     // of the field at fault
  std::string problem;  // "what is wrong (value); what would be right"
};

// Whether `path` is `field` or lies inside it.
bool IsWithin(absl::string_view path, absl::string_view field);

// Collects mistakes of one message; `At` gives the paths of its fields.
class Mistakes {
 public:
  void Add(std::string path, std::string problem) {
    mistakes_.push_back({std::move(path), std::move(problem)});
  }
  // "must be at least MINIMUM".
  void AtLeast(const std::string& path, int64_t value, int64_t minimum);
  void Between(const std::string& path, int64_t value, int64_t minimum, int64_t maximum);
  // A finite number that is greater than 0 / not negative / in [0, 1).
  void Positive(const std::string& path, double value);
  void NotNegative(const std::string& path, double value);
  void Fraction(const std::string& path, double value);
  void Required(const std::string& path, bool present, absl::string_view what);

  // Whether there is one about `path` or a field inside it.
  bool HasWithin(const std::string& path) const;

  std::vector<Mistake> Take() { return std::move(mistakes_); }

 private:
  std::vector<Mistake> mistakes_;
};

// Names become parts of file names, addresses, metrics and model names.
void CheckName(const std::string& path, const std::string& name, Mistakes* mistakes);

// host:port.
void CheckAddress(const std::string& path, const std::string& address, Mistakes* mistakes);

// Addresses that the job has used, and the list that has each.
using Addresses = std::map<std::string, std::string>;

// Endpoints of a group's or teacher's processes. One address is one process, which may be a
// prediction server of several groups.
void CheckEndpoints(const std::string& path,
                    const google::protobuf::RepeatedPtrField<Endpoint>& endpoints, int processes,
                    absl::string_view count_field, Addresses* addresses, Mistakes* mistakes);

// Devices of processes, in validate_devices.cc. `path`: of the group or teacher.
void CheckGroupDevices(const std::string& path, const GroupConfig& group, Mistakes* mistakes);
void CheckTeacherDevices(const std::string& path, const TeacherConfig& teacher, Mistakes* mistakes);
void CheckEvaluatorDevice(const EvaluatorConfig& evaluator, Mistakes* mistakes);

// The parts of FindMistakes.
void CheckData(const JobConfig& job, Mistakes* mistakes);             // validate_data.cc
void CheckModelInputs(const JobConfig& job, Mistakes* mistakes);      // against the data's batches
void CheckEmbeddingTables(const JobConfig& job, Mistakes* mistakes);  // validate_embedding.cc
void CheckMembership(const JobConfig& job, Mistakes* mistakes);       // validate_membership.cc
void CheckCompute(const JobConfig& job, Mistakes* mistakes);          // validate_compute.cc
void CheckTeachers(const JobConfig& job, Addresses* addresses,
                   Mistakes* mistakes);                                   // validate_teachers.cc
void CheckPrediction(const JobConfig& job, Mistakes* mistakes);           // validate_prediction.cc
void CheckOptimizer(const TrainingConfig& training, Mistakes* mistakes);  // validate_optimizer.cc

// All mistakes of a job, in the order of its fields.
std::vector<Mistake> FindMistakes(const JobConfig& job);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_VALIDATE_H_
