#ifndef CODISTILL_WORKER_DATA_DATASET_H_
#define CODISTILL_WORKER_DATA_DATASET_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/config/batch_fields.h"
#include "common/tensor/tensor.h"
#include "proto/job.pb.h"
#include "worker/data/example_order.h"

namespace codistill {

// Examples as a model and its loss take them.
struct Batch {
  // One a field of the data set, with the number of examples before the field's own shape. A
  // model's inputs are found here by name.
  std::vector<NamedTensor> fields;
  // SOFTMAX_CROSS_ENTROPY: INT64 classes. Else FLOAT targets. Shape [examples], text: [examples,
  // unroll].
  Tensor labels;
  int64_t examples = 0;
  int64_t rows = 0;  // labels in all: examples x labels an example
  // INT64 [examples]. Two examples have the same id exactly when a model is shown the same: a hash
  // of the record and, where there is random augmentation, of group and epoch. What a prediction is
  // cached by.
  Tensor example_ids;
  // Sequential data: the batch begins a pass over the text, so recurrent state starts from zeros.
  bool reset_state = false;

  // The field of this name; null if there is none.
  const Tensor* field(const std::string& name) const;
};

// A set of labelled examples, the same in every process that reads it from the same files. All
// methods are thread-safe.
class Dataset {
 public:
  virtual ~Dataset() = default;

  int64_t size() const { return shape_.size; }
  const std::vector<BatchField>& fields() const { return fields_; }
  // Classes of the label, text: words of the vocabulary; 0 = the label is a number.
  int64_t num_classes() const { return shape_.num_classes; }
  // Labels of one example: 1, text: unroll.
  int64_t labels_per_example() const { return shape_.labels_per_example; }
  // Sequential data only, else 0. Example segment * lanes + lane is segment `segment` of stream
  // `lane`: what follows example i in its stream is example i + lanes, and recurrent state carries
  // from the one to the other.
  int64_t lanes() const { return shape_.lanes; }
  bool sequential() const { return shape_.lanes > 0; }
  // One line about what was read, for the log.
  const std::string& summary() const { return shape_.summary; }

  // Fills `batch` with the examples `refs`, which must be in [0, size). Errors name the record at
  // fault by file and place; none are possible for data that was checked while it was read (all but
  // images).
  virtual absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const = 0;

  // Adds how often the labels of examples `refs` are each class to `counts`, by class. Only where
  // labels are classes (num_classes() > 0). Reads nothing that was not read at the start.
  virtual void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const = 0;

 protected:
  struct Shape {
    int64_t size = 0;
    int64_t num_classes = 0;
    int64_t labels_per_example = 1;
    int64_t lanes = 0;
    std::string summary;
  };
  Dataset(const DatasetConfig& config, LabelLoss loss, Shape shape);

  // Allocates the tensors of a batch of so many examples; what is in them is for Fill to say.
  void Allocate(int64_t examples, Batch* batch) const;
  // Stores label `row` of a batch. Classes only.
  void SetClass(int64_t row, int64_t label, Batch* batch) const;

 private:
  const std::vector<BatchField> fields_;
  const LabelLoss loss_;
  const Shape shape_;
};

struct DatasetOptions {
  const JobConfig* job = nullptr;  // must be valid; only used during the call
  bool training = true;            // data.train or data.validation
  int group = 0;                   // training: whose part, whose lanes, whose augmentation
  std::string data_dir;            // what relative file names are relative to
  int threads = 1;                 // that Fill may use
  // Memory for images that have been decoded: those of the first epoch, as far as it goes.
  int64_t decoded_image_bytes = int64_t{256} << 20;
};

// Reads a job's data set.
//   NOT_FOUND          a file does not exist: the field that names it, the path it was resolved to
//   DATA_LOSS          a file is truncated or damaged
//   INVALID_ARGUMENT   a bad record (file:line, column, what was expected), or data that does not
//   fit the
//                      job: another number of classes than model.num_outputs, fewer examples than
//                      groups
absl::StatusOr<std::unique_ptr<Dataset>> CreateDataset(const DatasetOptions& options);

// The order in which a group trains on its data.train set.
ExampleOrder TrainingOrder(const JobConfig& job, int group, const Dataset& dataset);

// How often each class is the label in what a group trains on in one epoch.
std::vector<int64_t> TrainingLabelCounts(const JobConfig& job, int group, const Dataset& dataset);

// Examples [begin, end) of the `total` on which an evaluation measures: all in their order where
// `total` is the size of the data set; else a sample that is the same each time, and random, as
// data are often sorted by class. Sequential data: the beginning of the text.
std::vector<ExampleRef> EvaluationExamples(const Dataset& dataset, int64_t total, int64_t begin,
                                           int64_t end);

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_DATASET_H_
