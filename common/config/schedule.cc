#include "common/config/schedule.h"

#include <algorithm>
#include <cmath>

#include "common/config/teachers.h"

namespace codistill {
namespace {

bool IsDue(int64_t every, int64_t step, int64_t last) {
  return step >= 1 && (step == last || (every > 0 && step % every == 0));
}

}  // namespace

double ScheduleFactor(const Schedule& schedule, int64_t step, int64_t last_step) {
  constexpr double kPi = 3.14159265358979323846;
  const double floor = schedule.end_factor();
  // Counted in steps taken before this one, so that step 1 has the full rate.
  const int64_t decay = schedule.decay_steps() > 0 ? schedule.decay_steps() : last_step;
  const double part =
      decay > 0 ? std::clamp(static_cast<double>(step - 1) / static_cast<double>(decay), 0.0, 1.0)
                : 0.0;
  double factor = 1;
  switch (schedule.kind()) {
    case Schedule::CONSTANT:
      break;
    case Schedule::LINEAR:
      factor = 1 + (floor - 1) * part;
      break;
    case Schedule::COSINE:
      factor = floor + (1 - floor) * 0.5 * (1 + std::cos(kPi * part));
      break;
    case Schedule::STEP:
      for (const int64_t boundary : schedule.step_boundaries()) {
        if (step >= boundary) factor *= schedule.step_factor();
      }
      break;
  }
  if (schedule.warmup_steps() > 0) {
    factor *=
        std::min(1.0, static_cast<double>(step) / static_cast<double>(schedule.warmup_steps()));
  }
  return factor;
}

double LearningRateAt(const JobConfig& job, int64_t step) {
  const OptimizerConfig& optimizer = job.training().optimizer();
  return optimizer.learning_rate() * ScheduleFactor(optimizer.schedule(), step, job.stop().steps());
}

double WeightDecayAt(const JobConfig& job, int64_t step) {
  const OptimizerConfig& optimizer = job.training().optimizer();
  return optimizer.weight_decay() *
         ScheduleFactor(optimizer.weight_decay_schedule(), step, job.stop().steps());
}

float TeacherWeightAt(const JobConfig& job, int64_t step) {
  const CodistillationConfig& codistillation = job.codistillation();
  if (!HasTeachers(job)) return 0;
  const int64_t after = step - codistillation.burn_in_steps();
  if (after <= 0) return 0;
  if (after >= codistillation.ramp_steps()) return codistillation.weight();
  return static_cast<float>(codistillation.weight() * static_cast<double>(after) /
                            static_cast<double>(codistillation.ramp_steps()));
}

int64_t TeacherWaitMs(const CodistillationConfig& config) {
  constexpr int64_t kDefaultOfWait = 60000;
  if (config.has_teacher_wait_ms()) return config.teacher_wait_ms();
  return config.on_teacher_loss() == CodistillationConfig::WAIT ? kDefaultOfWait : 0;
}

bool PublishesAt(const JobConfig& job, int64_t step) {
  return IsDue(job.training().publish_every_steps(), step, job.stop().steps());
}

bool CheckpointsAt(const JobConfig& job, int64_t step) {
  return IsDue(job.checkpoint().every_steps(), step, job.stop().steps());
}

bool EvaluatesAt(const JobConfig& job, int64_t step) {
  return IsDue(job.evaluation().every_steps(), step, job.stop().steps());
}

}  // namespace codistill
