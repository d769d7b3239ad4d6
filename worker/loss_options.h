#ifndef CODISTILL_WORKER_LOSS_OPTIONS_H_
#define CODISTILL_WORKER_LOSS_OPTIONS_H_

#include "cuda/loss.h"
#include "proto/job.pb.h"
#include "worker/teacher_source.h"

namespace codistill {

// The training loss of a job, as the kernel takes it.
LossOptions LossOptionsOf(const JobConfig& job);

// What a validation loss is: the label loss alone, without smoothing. Ignored labels do not count
// there either.
LossOptions LabelLossOptionsOf(const JobConfig& job);

// Teachers as the kernel takes them; valid as long as what they are made of. `logits`: fp32, or in
// 16 bits as they came.
DenseTeacher DenseTeacherOf(const Tensor& logits);
TopKTeacher TopKTeacherOf(const TopKPrediction& prediction);

}  // namespace codistill

#endif  // CODISTILL_WORKER_LOSS_OPTIONS_H_
