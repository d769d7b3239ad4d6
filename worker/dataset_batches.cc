#include "worker/dataset_batches.h"

#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/config/embedding.h"
#include "common/model/inputs.h"

namespace codistill {

absl::StatusOr<StudentBatch> ToStudentBatch(const ModelConfig& model, Batch batch) {
  StudentBatch student;
  for (int i = 0; i < model.inputs_size(); ++i) {
    const Tensor* field = batch.field(InputField(model.inputs(i)));
    if (field == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "model.inputs[", i, "]: the data has no field \"", InputField(model.inputs(i)), "\""));
    }
    student.inputs.push_back(*field);
  }
  CODISTILL_ASSIGN_OR_RETURN(student.examples, CheckInputs(model, student.inputs));
  student.rows = batch.rows;
  if (batch.labels.dtype() == DT_INT64) {
    student.labels = std::move(batch.labels);
  } else {
    student.targets = std::move(batch.labels);
  }
  student.example_ids = std::move(batch.example_ids);
  student.starts_epoch = batch.reset_state;
  return student;
}

absl::StatusOr<StudentBatch> DatasetBatches::Build(uint64_t first, int64_t count) {
  Batch batch;
  CODISTILL_RETURN_IF_ERROR(dataset_->Fill(order_.Range(first, count), &batch));
  return ToStudentBatch(model_, std::move(batch));
}

}  // namespace codistill
