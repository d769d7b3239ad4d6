#ifndef CODISTILL_WORKER_TEACHER_CLIENT_H_
#define CODISTILL_WORKER_TEACHER_CLIENT_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/metrics/metrics.h"
#include "proto/job.pb.h"
#include "worker/inference_channel.h"
#include "worker/teacher_source.h"

namespace codistill {

// Teacher predictions from prediction servers.
//
// Every announced batch is asked of every teacher at once, of the server of that teacher with the
// fewest questions under way. A question that fails (or is answered by weights that are too old) is
// counted and asked again, of another server where there is one, with capped exponential back-off a
// server, for as long as somebody may still want the answer: until its step has been taken. Late
// answers are cancelled then, so that a slow server does not work for nothing.
//
// Under SKIP a step uses the teachers that have answered; under WAIT it waits for all of them, up
// to teacher_wait_ms, and then does the same; under FAIL a missing one is an error.
//
// Recurrent teachers: the state that comes back with one batch goes with the next, so the questions
// to one teacher form a chain, one at a time, in batch order. A gap in the chain (failure, first
// use, skipped batch) or the beginning of an epoch starts from zeros.
class TeacherClient : public TeacherSource {
 public:
  struct Teacher {
    std::string name;  // group: the model's name at its servers
    std::vector<std::string> addresses;
  };
  struct Options {
    std::vector<Teacher> teachers;
    ModelConfig model;
    CodistillationConfig codistillation;
    Metrics* metrics = nullptr;  // optional, not owned
    // Null: over gRPC. Endpoints are numbered through all teachers' addresses, in order.
    std::unique_ptr<InferenceChannel> channel;
  };

  // Names and addresses of those who teach `group`; empty without codistillation.
  static std::vector<Teacher> TeachersInJob(const JobConfig& job, int group);

  // INVALID_ARGUMENT: no teachers, or one without an address (names it).
  static absl::StatusOr<std::unique_ptr<TeacherClient>> Create(Options options);
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_CLIENT_H_
