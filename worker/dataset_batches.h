#ifndef CODISTILL_WORKER_DATASET_BATCHES_H_
#define CODISTILL_WORKER_DATASET_BATCHES_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "proto/job.pb.h"
#include "worker/batch_source.h"
#include "worker/data/dataset.h"
#include "worker/data/example_order.h"

namespace codistill {

// A data set's batch as the model's inputs and the loss kernel's labels. INVALID_ARGUMENT names an
// input that is no field of the data, or of another type or shape than the job says.
absl::StatusOr<StudentBatch> ToStudentBatch(const ModelConfig& model, Batch batch);

// The batches a group trains on.
class DatasetBatches : public BatchSource {
 public:
  // `dataset` is not owned.
  DatasetBatches(ModelConfig model, const Dataset* dataset, ExampleOrder order)
      : model_(std::move(model)), dataset_(dataset), order_(order) {}

  absl::StatusOr<StudentBatch> Build(uint64_t first, int64_t count) override;

 private:
  const ModelConfig model_;
  const Dataset* const dataset_;
  const ExampleOrder order_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATASET_BATCHES_H_
