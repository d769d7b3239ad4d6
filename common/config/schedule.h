#ifndef CODISTILL_COMMON_CONFIG_SCHEDULE_H_
#define CODISTILL_COMMON_CONFIG_SCHEDULE_H_

#include <cstdint>

#include "proto/job.pb.h"

// Everything that changes with the step as pure functions of (job, step); step counts from 1.
namespace codistill {

double LearningRateAt(const JobConfig& job, int64_t step);
// training.optimizer.weight_decay under its own schedule; parameter groups multiply it.
double WeightDecayAt(const JobConfig& job, int64_t step);
// The factor of either: a linear warm-up times the schedule's kind. `last_step` stands for
// decay_steps where that is 0.
double ScheduleFactor(const Schedule& schedule, int64_t step, int64_t last_step);

// Weight of psi: 0 up to and including burn_in_steps, then the ramp, then `weight`. 0 when
// codistillation is off or nobody teaches.
float TeacherWeightAt(const JobConfig& job, int64_t step);

// How long a step may wait for its predictions beyond its own compute, in milliseconds:
// teacher_wait_ms, or its default for on_teacher_loss.
int64_t TeacherWaitMs(const CodistillationConfig& config);

// Whether the state after `step` becomes a cut (every publish_every_steps, and the last step).
bool PublishesAt(const JobConfig& job, int64_t step);
// Whether a checkpoint follows `step` (every checkpoint.every_steps, and the last step).
bool CheckpointsAt(const JobConfig& job, int64_t step);
// Whether the evaluator measures the cut of `step` (every evaluation.every_steps, and the last
// step). Validation makes sure that such a step is also a published one.
bool EvaluatesAt(const JobConfig& job, int64_t step);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_SCHEDULE_H_
