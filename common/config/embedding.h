#ifndef CODISTILL_COMMON_CONFIG_EMBEDDING_H_
#define CODISTILL_COMMON_CONFIG_EMBEDDING_H_

#include <cstdint>
#include <string>

#include "proto/job.pb.h"

// What a job says about embedding tables, for everybody who has to do with them. Pure functions of
// a validated job.
namespace codistill {

// Field of the data's batches that gives an input its values: `field`, or its name.
const std::string& InputField(const ModelInput& input);

// Whether an input's values are keys whose rows forward() takes.
inline bool IsEmbedded(const ModelInput& input) { return !input.embedding_table().empty(); }
bool HasEmbeddings(const ModelConfig& model);

// Index in model.embedding_tables; -1 if there is no table of that name.
int FindEmbeddingTable(const ModelConfig& model, const std::string& name);

// The model as its archive sees it: each input with a table is FLOAT [B, shape..., dim] rather than
// the INT64 keys that data and requests bring. `embedding_table` stays set: such an input wants its
// gradient.
ModelConfig ForwardConfig(const ModelConfig& model);

// Seed of a table's initial rows in one group: of (job's seed, group, table, its own seed).
uint64_t EmbeddingSeed(const JobConfig& job, int group, int table);

// Learning rate of a table's rows where the dense one is `dense`: its own, times the factor that
// the schedule makes of training.optimizer.learning_rate.
double EmbeddingLearningRate(const JobConfig& job, const RowOptimizerConfig& optimizer,
                             double dense);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_EMBEDDING_H_
