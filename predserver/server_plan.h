#ifndef CODISTILL_PREDSERVER_SERVER_PLAN_H_
#define CODISTILL_PREDSERVER_SERVER_PLAN_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/followed_model.h"
#include "proto/job.pb.h"

// From a prediction server's command line to the models that it serves.
namespace codistill {

// As given; docs/user_guide.md says what each means.
struct ServerFlags {
  std::string job;
  std::string group;    // one name or several, separated by commas
  std::string teacher;  // of job.teachers
  int index = 0;
  std::string archive;
  std::string checkpoint;
  bool follow = false;
  std::string model;        // file with a ModelConfig
  std::string name;         // of the archive's model
  std::string weights;      // "", "FP32", "BF16" or "INT8"
  int held_versions = 0;    // 0: the job's
  int compute_threads = 0;  // 0: the job's
  int spin_us = 0;
  bool optimize_passes = true;
  std::string device;     // "", "cpu" or "cuda:N"
  std::string precision;  // "", "FP32" or "BF16"
};

struct ServedModel {
  std::string name;
  ModelConfig config;
  std::shared_ptr<FollowedModel> followed;
};

// What one process serves, and as whom.
struct ServerPlan {
  // Of the server; without a job file one that has only what was given, and defaults. Its
  // prediction section has the flags' word, where they have one.
  JobConfig job;
  std::vector<std::string> names;  // of the models
  std::string group;               // what this server calls itself: the names, separated by commas
  bool optimize_passes = true;
  std::string device = "cpu";
  int index = 0;
  Endpoint endpoint;  // empty: wherever there is room
};

// Reads and checks everything that does not need the models' files. INVALID_ARGUMENT with a line
// for each mistake in the flags; mistakes in the files as LoadJob tells them.
absl::StatusOr<ServerPlan> PlanServer(const ServerFlags& flags);

// Opens the models: those of groups follow from now on, frozen ones are loaded. Errors name the
// model.
absl::StatusOr<std::vector<ServedModel>> OpenModels(const ServerPlan& plan);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_SERVER_PLAN_H_
