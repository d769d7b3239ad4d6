#include "worker/trainer_harness.h"

#include <cmath>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace codistill {

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(1));
  }
  return true;
}

float InputOf(uint64_t example, int64_t i) {
  return std::sin(static_cast<float>(example * 7 + i * 3 + 1));
}

int64_t LabelOf(uint64_t example) { return static_cast<int64_t>(example * 5 % 7 % kOutputs); }

absl::StatusOr<StudentBatch> PlainBatches::Build(uint64_t first, int64_t count) {
  if (first >= bad_from) return absl::InvalidArgumentError("train.csv:17: bad record");
  StudentBatch batch;
  Tensor x = Tensor::Allocate(DT_FLOAT, {count, kInputs});
  batch.labels = Tensor::Allocate(DT_INT64, {count});
  batch.example_ids = Tensor::Allocate(DT_INT64, {count});
  for (int64_t r = 0; r < count; ++r) {
    const uint64_t example = (first + r) % kEpoch;
    for (int64_t i = 0; i < kInputs; ++i) x.As<float>()[r * kInputs + i] = InputOf(example, i);
    batch.labels.As<int64_t>()[r] = LabelOf(example);
    batch.example_ids.As<int64_t>()[r] = static_cast<int64_t>(example);
  }
  batch.inputs.push_back(x);
  batch.examples = count;
  batch.rows = count + extra_rows;
  batch.starts_epoch = first % kEpoch == 0;
  return batch;
}

void FixedTeacher::Request(const TeacherBatch& batch) {
  MutexLock lock(&mu_);
  requested_.push_back(batch.step);
  ++counters_.requests;
}

absl::StatusOr<TeacherPredictions> FixedTeacher::Take(const TeacherBatch& batch) {
  MutexLock lock(&mu_);
  taken_.push_back(batch.step);
  generations_.push_back(batch.generation);
  if (!error.ok()) return error;
  TeacherPredictions predictions;
  if (silent_from <= batch.step && batch.step < silent_to) return predictions;
  Tensor logits = Tensor::Zeros(DT_FLOAT, {batch.rows, kOutputs});
  for (int64_t r = 0; r < batch.rows; ++r) logits.As<float>()[r * kOutputs] = 2;
  if (batch.step == diverged_at) {
    logits.As<float>()[4] = std::numeric_limits<float>::quiet_NaN();
  }
  if (top_k) {
    TopKPrediction two;
    two.index = Tensor::Zeros(DT_INT32, {batch.rows, 2});
    two.value = Tensor::Allocate(DT_FLOAT, {batch.rows, 2});
    two.tail = Tensor::Allocate(DT_FLOAT, {batch.rows});
    const float sum = std::exp(2.0f) + 2;
    for (int64_t r = 0; r < batch.rows; ++r) {
      two.index.As<int32_t>()[2 * r + 1] = batch.step == malformed_at ? 0 : 1;
      two.value.As<float>()[2 * r] = std::exp(2.0f) / sum;
      two.value.As<float>()[2 * r + 1] = two.tail.As<float>()[r] = 1 / sum;
    }
    predictions.top_k.push_back(std::move(two));
  } else {
    predictions.logits.push_back(logits);
  }
  predictions.staleness_steps = batch.step % 4;
  predictions.prefetch_lag_steps = 1;
  return predictions;
}

void FixedTeacher::Reset() {
  size_t before = 0;
  {
    MutexLock lock(&mu_);
    ++resets_;
    before = requested_.size();
  }
  absl::SleepFor(reset_time);
  MutexLock lock(&mu_);
  forgotten_ += requested_.size() - before;
}

TeacherSource::Counters FixedTeacher::counters() const {
  MutexLock lock(&mu_);
  return counters_;
}

std::vector<int64_t> FixedTeacher::requested() const {
  MutexLock lock(&mu_);
  return requested_;
}

std::vector<int64_t> FixedTeacher::taken() const {
  MutexLock lock(&mu_);
  return taken_;
}

size_t FixedTeacher::forgotten() const {
  MutexLock lock(&mu_);
  return forgotten_;
}

int FixedTeacher::resets() const {
  MutexLock lock(&mu_);
  return resets_;
}

JobConfig Job() {
  JobConfig job;
  job.set_name("test");
  job.set_seed(3);
  auto* input = job.mutable_model()->add_inputs();
  input->set_name("x");
  input->add_shape(kInputs);
  job.mutable_model()->set_num_outputs(kOutputs);
  job.add_groups()->set_name("alpha");
  job.add_groups()->set_name("beta");
  job.mutable_training()->set_batch_size(kBatch);
  job.mutable_training()->mutable_optimizer()->set_learning_rate(0.5);
  job.mutable_codistillation()->set_enabled(false);
  job.mutable_stop()->set_steps(kSteps);
  return job;
}

void EnableCodistillation(int64_t burn_in, JobConfig* job) {
  job->mutable_codistillation()->set_enabled(true);
  job->mutable_codistillation()->set_burn_in_steps(burn_in);
}

TestWorker::TestWorker(JobConfig the_job, bool recurrent, float noise)
    : job(std::move(the_job)),
      model(kInputs, kOutputs, recurrent, noise,
            1 + static_cast<int>(job.training().weights_lag())) {
  if (recurrent) {
    auto* state = job.mutable_model()->add_states();
    state->set_name("h");
    for (int64_t dimension : {1, -1, 1}) state->add_shape(dimension);
  }
  group = std::make_unique<FakeGroup>(job, model.tensors());
  leader = group->leader();
}

std::unique_ptr<Trainer> TestWorker::MakeTrainer() {
  Trainer::Options options;
  options.job = job;
  options.leader = leader.get();
  options.model = &model;
  options.batches = &batches;
  options.teachers = teachers;
  options.progress = &progress;
  options.connect = group->connect();
  options.process_nonce = 77;
  options.heartbeat_interval = absl::Milliseconds(5);
  options.drain_grace = absl::Milliseconds(20);
  auto trainer = Trainer::Create(std::move(options));
  EXPECT_TRUE(trainer.ok()) << trainer.status();
  return *std::move(trainer);
}

}  // namespace codistill
