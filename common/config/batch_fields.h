#ifndef CODISTILL_COMMON_CONFIG_BATCH_FIELDS_H_
#define CODISTILL_COMMON_CONFIG_BATCH_FIELDS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "proto/job.pb.h"

namespace codistill {

// One field of a batch: what a model may name as an input.
struct BatchField {
  std::string name;
  DataType dtype = DT_INVALID;
  std::vector<int64_t> shape;  // of one example
};

// The fields of a data source, which its configuration alone determines. Validation holds a model's
// inputs against them, readers fill them.
std::vector<BatchField> BatchFields(const DatasetConfig& dataset);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_BATCH_FIELDS_H_
