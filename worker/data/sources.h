// The readers behind CreateDataset.

#ifndef CODISTILL_WORKER_DATA_SOURCES_H_
#define CODISTILL_WORKER_DATA_SOURCES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/repeated_field.h"
#include "worker/data/dataset.h"

namespace codistill {
namespace internal {

absl::StatusOr<std::unique_ptr<Dataset>> CreateSynthetic(const DatasetOptions& options);
absl::StatusOr<std::unique_ptr<Dataset>> CreateCsv(const DatasetOptions& options);
absl::StatusOr<std::unique_ptr<Dataset>> CreateText(const DatasetOptions& options);
absl::StatusOr<std::unique_ptr<Dataset>> CreateImages(const DatasetOptions& options);

// data.train or data.validation of the job, whichever is meant.
const DatasetConfig& ConfigOf(const DatasetOptions& options);
// "data.train" or "data.validation".
std::string FieldOf(const DatasetOptions& options);

// Paths of a list of files. NOT_FOUND names the field, the path and the directory it was resolved
// against.
absl::StatusOr<std::vector<std::string>> ResolveFiles(
    const std::string& field, const google::protobuf::RepeatedPtrField<std::string>& files,
    const std::string& data_dir);

// First word of the ids of a data set's examples.
uint64_t IdSalt(const DatasetOptions& options);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_SOURCES_H_
