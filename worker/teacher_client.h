#ifndef CODISTILL_WORKER_TEACHER_CLIENT_H_
#define CODISTILL_WORKER_TEACHER_CLIENT_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/metrics/metrics.h"
#include "proto/job.pb.h"
#include "worker/inference_channel.h"
#include "worker/teacher_list.h"
#include "worker/teacher_source.h"

namespace codistill {

// Teacher predictions from servers of the Open Inference Protocol: our own prediction servers, or
// anybody's (worker/teacher_list.h).
//
// Every announced batch is asked of every teacher at once, of the server that
// worker/teacher_endpoints.h chooses. A question that fails (or is answered by weights that are too
// old) is counted and asked again, of another server where there is one, for as long as somebody
// may still want the answer: until its step has been taken. Late answers are cancelled then, so
// that a slow server does not work for nothing.
//
// Hedging (codistillation.hedge_after_ms; Dean and Barroso 2013, "The Tail at Scale"): a question
// without an answer after so long goes to another server of the same teacher too. The first good
// answer counts; the other question is cancelled, which is no failure.
//
// Under SKIP a step uses the teachers that have answered; under WAIT it waits for all of them, up
// to teacher_wait_ms, and then does the same; under FAIL a missing one is an error.
//
// Recurrent teachers: the state that comes back with one batch goes with the next, so the questions
// to one teacher form a chain, one at a time, in batch order. A gap in the chain (failure, first
// use, skipped batch) or the beginning of an epoch starts from zeros.
//
// When a server answers from another generation of the teacher's group, what was predicted in the
// one before is asked again; of a recurrent teacher every batch still to come, once, from zeros. An
// answer of the generation before that was overtaken by one of the next is a failure.
//
// Bounds: a question holds at most two calls, and batches kept are at most prefetch and a few.
// Questions are sent by the thread that announces, by that of the answers, and by one of the
// client's own: the training thread sends only what was never announced.
class TeacherClient : public TeacherSource {
 public:
  using Teacher = TeacherServers;
  struct Options {
    std::vector<Teacher> teachers;
    ModelConfig model;
    CodistillationConfig codistillation;
    Metrics* metrics = nullptr;  // optional, not owned
    // Null: over gRPC. Endpoints are numbered through all teachers' addresses, in order.
    std::unique_ptr<InferenceChannel> channel;
  };

  // Who teaches `group`; empty without codistillation.
  static std::vector<Teacher> TeachersInJob(const JobConfig& job, int group) {
    return TeacherServersOf(job, group);
  }

  // INVALID_ARGUMENT: no teachers, or one without an address (names it).
  static absl::StatusOr<std::unique_ptr<TeacherClient>> Create(Options options);
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TEACHER_CLIENT_H_
