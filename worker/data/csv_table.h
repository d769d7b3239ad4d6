#ifndef CODISTILL_WORKER_DATA_CSV_TABLE_H_
#define CODISTILL_WORKER_DATA_CSV_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "proto/job.pb.h"

namespace codistill {

// Turns the text of records into numbers as a CsvConfig says: what was fitted on the fit files, and
// how it is applied. Immutable once fitted.
class CsvSchema {
 public:
  // Reads `fit_files` for statistics and vocabularies.
  static absl::StatusOr<CsvSchema> Fit(const CsvConfig& config,
                                       const std::vector<std::string>& fit_files);

  // One record, encoded.
  struct Record {
    std::vector<float> numeric;  // in the order of the columns
    std::vector<int64_t> categorical;
    std::vector<int64_t> hashed;  // keys of embedding tables
    float label = 0;              // class, or the number itself
  };
  // `place` ("file:line") is named in errors, which also name the column, its value and what would
  // be right.
  absl::Status Encode(absl::Span<const absl::string_view> values, absl::string_view place,
                      Record* record) const;

  int numeric_columns() const { return static_cast<int>(numeric_.size()); }
  int categorical_columns() const { return static_cast<int>(categorical_.size()); }
  int hashed_columns() const { return static_cast<int>(hashed_.size()); }
  // Indices of each categorical column, 0 included: what a model's tables need.
  std::vector<int64_t> cardinalities() const;
  int64_t num_classes() const { return num_classes_; }

 private:
  struct Numeric {
    int column;
    bool log1p;
    // Running statistics (Welford), then what standardises.
    int64_t count = 0;
    double mean = 0;
    double squares = 0;
    double scale = 0;  // 1 / deviation; 0 for a constant column
  };
  struct Categorical {
    int column;
    int64_t cardinality;  // given; 0 = as many as there are
    absl::flat_hash_map<std::string, int64_t> index;
    // Fingerprints of fitted values beyond the cardinality: they share indices by hash, and only
    // values never met get 0.
    absl::flat_hash_set<uint64_t> beyond;
  };

  explicit CsvSchema(const CsvConfig& config);

  absl::Status Observe(absl::Span<const absl::string_view> values, absl::string_view place);
  bool IsMissing(absl::string_view value) const { return missing_.contains(value); }
  // "file:line: column 3 (age)".
  std::string Place(absl::string_view place, int column) const;
  absl::StatusOr<double> ParseNumber(absl::string_view value, bool log1p, absl::string_view place,
                                     int column) const;
  absl::StatusOr<float> ParseLabel(absl::string_view value, absl::string_view place) const;

  std::vector<std::string> names_;
  std::vector<Numeric> numeric_;
  std::vector<Categorical> categorical_;
  std::vector<int> hashed_;  // columns
  int label_column_ = -1;
  int64_t num_classes_ = 0;
  absl::flat_hash_map<std::string, int64_t> label_classes_;
  std::string label_texts_;  // for messages
  absl::btree_set<std::string> missing_;
};

// Calls `on_record` for every record of a file. Empty lines are skipped; a record with another
// number of values than `config` has columns is an INVALID_ARGUMENT that names file and line, as is
// whatever `on_record` returns. Values are text between delimiters: quotes mean nothing.
absl::Status ReadRecords(const CsvConfig& config, const std::string& path,
                         absl::FunctionRef<absl::Status(absl::Span<const absl::string_view> values,
                                                        absl::string_view place)>
                             on_record);

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_CSV_TABLE_H_
