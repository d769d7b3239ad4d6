#include "common/config/embedding.h"

#include <algorithm>

#include "common/base/random.h"

namespace codistill {

const std::string& InputField(const ModelInput& input) {
  return input.has_field() ? input.field() : input.name();
}

bool HasEmbeddings(const ModelConfig& model) { return model.embedding_tables_size() > 0; }

int FindEmbeddingTable(const ModelConfig& model, const std::string& name) {
  const auto& tables = model.embedding_tables();
  const auto it =
      std::find_if(tables.begin(), tables.end(),
                   [&name](const EmbeddingTableConfig& table) { return table.name() == name; });
  return it == tables.end() ? -1 : static_cast<int>(it - tables.begin());
}

ModelConfig ForwardConfig(const ModelConfig& model) {
  ModelConfig forward = model;
  for (ModelInput& input : *forward.mutable_inputs()) {
    if (!IsEmbedded(input)) continue;
    input.set_dtype(DT_FLOAT);
    input.add_shape(
        model.embedding_tables(FindEmbeddingTable(model, input.embedding_table())).dim());
  }
  return forward;
}

uint64_t EmbeddingSeed(const JobConfig& job, int group, int table) {
  const EmbeddingTableConfig& config = job.model().embedding_tables(table);
  return Mix(job.seed(), HashString(job.groups(group).name()), HashString(config.name()),
             config.seed());
}

double EmbeddingLearningRate(const JobConfig& job, const RowOptimizerConfig& optimizer,
                             double dense) {
  const double base = job.training().optimizer().learning_rate();
  return optimizer.learning_rate() * (base > 0 ? dense / base : 1.0);
}

}  // namespace codistill
