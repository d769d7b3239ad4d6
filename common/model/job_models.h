#ifndef CODISTILL_COMMON_MODEL_JOB_MODELS_H_
#define CODISTILL_COMMON_MODEL_JOB_MODELS_H_

#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/config/teachers.h"
#include "common/model/followed_model.h"
#include "proto/job.pb.h"

namespace codistill {

// The models that a job names: its groups, its frozen teachers, its ensembles of both. Each is
// loaded and followed once, however often it is asked for and in however many ensembles it is. Not
// thread-safe; what it returns is.
class JobModels {
 public:
  struct Options {
    JobConfig job;
    // As FollowedModel::Options and FrozenModelOptions have them.
    int threads = 1;
    DataType transfer_dtype = DT_FLOAT;
    DataType weights = DT_FLOAT;
    int held_versions = 1;
    bool low_priority = false;
    bool optimize_predict = false;
    std::string device = "cpu";
    Precision precision = FP32;
  };
  explicit JobModels(Options options);

  // Errors of FollowedModel::Create, LoadFrozenModel and CreateEnsemble, with the name of the
  // model. FAILED_PRECONDITION for an external teacher, whose weights nobody here has.
  absl::StatusOr<std::shared_ptr<FollowedModel>> Follow(const TeacherRef& model);

 private:
  absl::StatusOr<std::shared_ptr<FollowedModel>> Create(const TeacherRef& model);

  const Options options_;
  std::map<std::string, std::shared_ptr<FollowedModel>> models_;  // by name
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_JOB_MODELS_H_
