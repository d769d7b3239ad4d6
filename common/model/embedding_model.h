#ifndef CODISTILL_COMMON_MODEL_EMBEDDING_MODEL_H_
#define CODISTILL_COMMON_MODEL_EMBEDDING_MODEL_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/followed_rows.h"
#include "common/model/model.h"
#include "proto/job.pb.h"

namespace codistill {

// A model for inference whose inputs bring the keys of embedding tables, as data and requests do:
// the rows are looked up in `tables` (by index in config.embedding_tables) and put in their place
// before forward() runs. Only Predict, tensors and storage; like those of `model`, thread-safe.
std::shared_ptr<const Model> WithRows(const ModelConfig& config, std::shared_ptr<const Model> model,
                                      std::vector<std::shared_ptr<const FollowedRows>> tables);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_EMBEDDING_MODEL_H_
