// Delimited text with a column schema: CsvConfig in proto/job.proto.

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "worker/data/csv_table.h"
#include "worker/data/sources.h"

namespace codistill {
namespace {

class CsvDataset : public Dataset {
 public:
  // The records, one after the other.
  struct Columns {
    std::vector<float> numeric;        // [records, numeric columns]
    std::vector<int32_t> categorical;  // [records, categorical columns]
    std::vector<int64_t> hashed;       // [records, hashed columns]
    std::vector<float> labels;
  };

  CsvDataset(const DatasetConfig& config, LabelLoss loss, Shape shape, int numeric, int categorical,
             int hashed, uint64_t salt, Columns columns)
      : Dataset(config, loss, std::move(shape)),
        numeric_(numeric),
        categorical_(categorical),
        hashed_(hashed),
        salt_(salt),
        columns_(std::move(columns)) {}

  static absl::StatusOr<std::unique_ptr<Dataset>> Create(const DatasetOptions& options) {
    const CsvConfig& config = internal::ConfigOf(options).csv();
    const std::string field = internal::FieldOf(options);
    CODISTILL_ASSIGN_OR_RETURN(
        const std::vector<std::string> files,
        internal::ResolveFiles(field + ".csv.files", config.files(), options.data_dir));
    std::vector<std::string> fit_files = files;
    if (config.fit_files_size() > 0) {
      CODISTILL_ASSIGN_OR_RETURN(
          fit_files,
          internal::ResolveFiles(field + ".csv.fit_files", config.fit_files(), options.data_dir));
    }
    CODISTILL_ASSIGN_OR_RETURN(const CsvSchema schema, CsvSchema::Fit(config, fit_files));

    Columns columns;
    CsvSchema::Record record;
    for (const std::string& path : files) {
      CODISTILL_RETURN_IF_ERROR(ReadRecords(
          config, path,
          [&](absl::Span<const absl::string_view> values, absl::string_view place) -> absl::Status {
            CODISTILL_RETURN_IF_ERROR(schema.Encode(values, place, &record));
            columns.numeric.insert(columns.numeric.end(), record.numeric.begin(),
                                   record.numeric.end());
            columns.categorical.insert(columns.categorical.end(), record.categorical.begin(),
                                       record.categorical.end());
            columns.hashed.insert(columns.hashed.end(), record.hashed.begin(), record.hashed.end());
            columns.labels.push_back(record.label);
            return absl::OkStatus();
          }));
    }
    Shape shape;
    shape.size = static_cast<int64_t>(columns.labels.size());
    shape.num_classes = schema.num_classes();
    shape.summary = absl::StrCat(
        shape.size, " records of ", absl::StrJoin(files, ", "), "; categorical indices: ",
        schema.categorical_columns() == 0 ? "none" : absl::StrJoin(schema.cardinalities(), ","));
    return std::make_unique<CsvDataset>(
        internal::ConfigOf(options), options.job->model().label_loss(), std::move(shape),
        schema.numeric_columns(), schema.categorical_columns(), schema.hashed_columns(),
        internal::IdSalt(options), std::move(columns));
  }

  absl::Status Fill(absl::Span<const ExampleRef> refs, Batch* batch) const override {
    Allocate(static_cast<int64_t>(refs.size()), batch);
    size_t field = 0;
    float* numeric = numeric_ > 0 ? batch->fields[field++].tensor.As<float>().data() : nullptr;
    int64_t* categorical =
        categorical_ > 0 ? batch->fields[field++].tensor.As<int64_t>().data() : nullptr;
    int64_t* hashed = hashed_ > 0 ? batch->fields[field++].tensor.As<int64_t>().data() : nullptr;
    const auto ids = batch->example_ids.As<int64_t>();
    const bool classes = num_classes() > 0;
    for (size_t i = 0; i < refs.size(); ++i) {
      const int64_t index = refs[i].index;
      numeric = std::copy_n(columns_.numeric.data() + index * numeric_, numeric_, numeric);
      categorical = std::copy_n(columns_.categorical.data() + index * categorical_, categorical_,
                                categorical);
      hashed = std::copy_n(columns_.hashed.data() + index * hashed_, hashed_, hashed);
      if (classes) {
        SetClass(static_cast<int64_t>(i), static_cast<int64_t>(columns_.labels[index]), batch);
      } else {
        batch->labels.As<float>()[i] = columns_.labels[index];
      }
      ids[i] = static_cast<int64_t>(Mix(salt_, index));
    }
    return absl::OkStatus();
  }

  void CountLabels(absl::Span<const ExampleRef> refs, absl::Span<int64_t> counts) const override {
    for (const ExampleRef& ref : refs) ++counts[static_cast<int64_t>(columns_.labels[ref.index])];
  }

 private:
  const int numeric_;
  const int categorical_;
  const int hashed_;
  const uint64_t salt_;
  const Columns columns_;
};

}  // namespace

namespace internal {

absl::StatusOr<std::unique_ptr<Dataset>> CreateCsv(const DatasetOptions& options) {
  return CsvDataset::Create(options);
}

}  // namespace internal
}  // namespace codistill
