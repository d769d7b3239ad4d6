#include "worker/batch_pipeline.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "common/base/executor.h"
#include "common/base/random.h"
#include "common/base/trace.h"
#include "common/config/embedding.h"

namespace codistill {
namespace {

// How long one GetAssignments may wait on the leader. Leaving waits for it at worst.
constexpr absl::Duration kAssignmentWait = absl::Seconds(2);
// A leader that answers "nothing yet" at once is not asked more often than this.
constexpr absl::Duration kPause = absl::Milliseconds(20);

uint64_t HashExamples(const Tensor& ids) {
  uint64_t hash = 0;
  if (ids.empty()) return hash;
  for (int64_t id : ids.As<int64_t>()) hash = Mix(hash, static_cast<uint64_t>(id));
  return hash;
}

TeacherBatch AsQuestion(uint64_t generation, int64_t step, const StudentBatch& batch) {
  TeacherBatch question;
  question.generation = generation;
  question.step = step;
  question.example_hash = HashExamples(batch.example_ids);
  question.inputs = batch.inputs;
  question.example_ids = batch.example_ids;
  question.examples = batch.examples;
  question.rows = batch.rows;
  question.starts_epoch = batch.starts_epoch;
  return question;
}

}  // namespace

BatchPipeline::BatchPipeline(Options options)
    : options_(std::move(options)), thread_([this] { Run(); }) {}

BatchPipeline::~BatchPipeline() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  thread_.join();
}

void BatchPipeline::Restart(uint64_t generation, uint64_t incarnation) {
  MutexLock lock(&mu_);
  ++session_;
  in_session_ = true;
  generation_ = generation;
  incarnation_ = incarnation;
  next_step_ = 0;
  completed_ = 0;
  skip_before_ = 0;
  assignments_.clear();
  ready_.clear();
  end_.reset();
  // Under the lock: what the new session announces is not forgotten with the rest.
  if (options_.teachers != nullptr) options_.teachers->Reset();
}

void BatchPipeline::Resume() {
  MutexLock lock(&mu_);
  if (!end_.has_value() || absl::IsOutOfRange(*end_)) return;
  end_.reset();
  in_session_ = true;
}

void BatchPipeline::SetCompleted(int64_t step) {
  MutexLock lock(&mu_);
  completed_ = step;
}

uint64_t BatchPipeline::end_example() const {
  MutexLock lock(&mu_);
  return end_example_;
}

void BatchPipeline::SkipTo(int64_t step) {
  MutexLock lock(&mu_);
  while (!assignments_.empty() && assignments_.front().step() < step) assignments_.pop_front();
  while (!ready_.empty() && ready_.front()->assignment.step() < step) ready_.pop_front();
  next_step_ = std::max(next_step_, step);
  skip_before_ = std::max(skip_before_, step);
}

absl::StatusOr<std::unique_ptr<BatchPipeline::Step>> BatchPipeline::Next(absl::Time deadline) {
  MutexLock lock(&mu_);
  mu_.AwaitWithDeadline(absl::Condition(this, &BatchPipeline::HasNews), deadline);
  if (!ready_.empty()) {
    std::unique_ptr<Step> step = std::move(ready_.front());
    ready_.pop_front();
    return step;
  }
  if (end_.has_value()) return *end_;
  return absl::DeadlineExceededError("no step is ready yet");
}

BatchPipeline::NextRows BatchPipeline::PeekRows() {
  MutexLock lock(&mu_);
  if (ready_.empty()) return {};
  const Step& step = *ready_.front();
  return {step.generation, step.assignment.weights_step(), step.rows};
}

void BatchPipeline::Run() {
  SetThreadName("batches");
  MutexLock lock(&mu_);
  for (;;) {
    mu_.Await(absl::Condition(this, &BatchPipeline::CanWork));
    if (stopping_) return;
    Work();
  }
}

void BatchPipeline::Work() {
  if (assignments_.empty()) {
    FetchAssignments();
  } else {
    BuildBatch();
  }
}

void BatchPipeline::FetchAssignments() {
  const uint64_t session = session_;
  GetAssignmentsRequest request;
  request.set_generation(generation_);
  request.set_rank(options_.rank);
  request.set_incarnation(incarnation_);
  request.set_first_step(next_step_);
  request.set_max_assignments(options_.ahead + 1 + options_.undecided);
  request.set_completed_step(completed_);
  mu_.Unlock();
  TraceSpan span("assignment", "assignments");
  span.Arg("first_step", request.first_step());
  const absl::Time start = absl::Now();
  absl::StatusOr<GetAssignmentsReply> reply =
      options_.leader->GetAssignments(std::move(request), start + kAssignmentWait);
  span.End();
  mu_.Lock();
  if (session != session_ || stopping_) return;
  const bool nothing = reply.ok() ? reply->assignments().empty() && !reply->finished()
                                  : absl::IsDeadlineExceeded(reply.status()) &&
                                        absl::Now() - start >= kAssignmentWait;
  if (nothing) {
    // A pause that a new session or the end cuts short.
    const auto changed = [this, session]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return stopping_ || session_ != session;
    };
    mu_.AwaitWithDeadline(absl::Condition(&changed), start + kPause);
    return;
  }
  if (!reply.ok()) {
    end_ = reply.status();
    in_session_ = false;
    return;
  }
  for (Assignment& assignment : *reply->mutable_assignments()) {
    if (assignment.step() < skip_before_) continue;  // skipped while it was asked for
    next_step_ = assignment.step() + 1;
    end_example_ =
        std::max<uint64_t>(end_example_, assignment.first_example() +
                                             static_cast<uint64_t>(assignment.num_examples()));
    assignments_.push_back(std::move(assignment));
  }
  if (reply->finished() && assignments_.empty()) {
    end_ = absl::OutOfRangeError("the group has finished");
    in_session_ = false;
  }
}

void BatchPipeline::BuildBatch() {
  const uint64_t session = session_;
  auto step = std::make_unique<Step>();
  step->generation = generation_;
  step->assignment = std::move(assignments_.front());
  assignments_.pop_front();
  mu_.Unlock();
  const Assignment& assignment = step->assignment;
  TraceSpan span("batch", "batch");
  span.Arg("step", assignment.step()).Arg("examples", assignment.num_examples());
  absl::StatusOr<StudentBatch> batch =
      options_.batches->Build(assignment.first_example(), assignment.num_examples());
  if (batch.ok()) {
    step->batch = *std::move(batch);
    if (HasEmbeddings(options_.model)) {
      step->rows =
          std::make_shared<std::vector<RowBatch>>(FindRows(options_.model, step->batch.inputs));
    }
    step->question = AsQuestion(step->generation, assignment.step(), step->batch);
    if (options_.on_inputs) options_.on_inputs(step->batch.inputs);
  } else {
    step->data_error = batch.status();
  }
  span.End();
  mu_.Lock();
  if (session != session_ || stopping_ || assignment.step() < skip_before_) return;
  if (!step->data_error.ok()) {
    in_session_ = false;
  } else if (options_.teachers != nullptr && options_.announce && assignment.teacher_weight() > 0) {
    // Under the lock: after a Restart nothing of an older session is announced. Request never
    // waits.
    options_.teachers->Request(step->question);
  }
  ready_.push_back(std::move(step));
}

}  // namespace codistill
