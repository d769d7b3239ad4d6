// The rules on embedding tables and on the inputs that name them.

#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/config/embedding.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

constexpr int64_t kMaxDim = 4096;
constexpr int64_t kMaxAdmission = 65535;
constexpr int64_t kMinTableBytes = 1 << 20;

std::string Index(absl::string_view field, int i) { return absl::StrCat(field, "[", i, "]"); }

std::string TableNames(const ModelConfig& model) {
  if (model.embedding_tables().empty()) return "an entry in model.embedding_tables";
  return absl::StrJoin(
      model.embedding_tables(), " or ",
      [](std::string* out, const EmbeddingTableConfig& table) { out->append(table.name()); });
}

void CheckRowOptimizer(const RowOptimizerConfig& optimizer, const std::string& path,
                       Mistakes* mistakes) {
  mistakes->Positive(path + ".learning_rate", optimizer.learning_rate());
  mistakes->NotNegative(path + ".initial_accumulator", optimizer.initial_accumulator());
  mistakes->Positive(path + ".epsilon", optimizer.epsilon());
  mistakes->NotNegative(path + ".l1", optimizer.l1());
  mistakes->NotNegative(path + ".l2", optimizer.l2());
  mistakes->NotNegative(path + ".beta", optimizer.beta());
  mistakes->Fraction(path + ".momentum", optimizer.momentum());
  mistakes->Fraction(path + ".beta1", optimizer.beta1());
  mistakes->Fraction(path + ".beta2", optimizer.beta2());
  mistakes->NotNegative(path + ".weight_decay", optimizer.weight_decay());
  if (optimizer.kind() == RowOptimizerConfig::FTRL && optimizer.weight_decay() > 0) {
    mistakes->Add(path + ".weight_decay",
                  absl::StrCat("not possible with kind FTRL (", optimizer.weight_decay(),
                               "); 0, and l2, would be right"));
  }
}

void CheckTable(const EmbeddingTableConfig& table, bool sync, const std::string& path,
                Mistakes* mistakes) {
  CheckName(path + ".name", table.name(), mistakes);
  mistakes->Required(path + ".dim", table.has_dim(), "the number of floats a row");
  if (table.has_dim()) mistakes->Between(path + ".dim", table.dim(), 1, kMaxDim);
  mistakes->NotNegative(path + ".init_scale", table.init_scale());
  CheckRowOptimizer(table.optimizer(), path + ".optimizer", mistakes);
  mistakes->Between(path + ".admission_min_count", table.admission_min_count(), 1, kMaxAdmission);
  mistakes->AtLeast(path + ".evict_age_steps", table.evict_age_steps(), 0);
  mistakes->NotNegative(path + ".evict_min_norm", table.evict_min_norm());
  if (table.insert_on_pull() && sync) {
    mistakes->Add(path + ".insert_on_pull",
                  "not possible with training.update_mode SYNC (true); false would be right");
  }
  if (table.max_bytes() != 0) {
    mistakes->AtLeast(path + ".max_bytes", table.max_bytes(), kMinTableBytes);
  }
}

}  // namespace

void CheckEmbeddingTables(const JobConfig& job, Mistakes* mistakes) {
  const ModelConfig& model = job.model();
  std::set<std::string> used;
  for (int i = 0; i < model.inputs_size(); ++i) {
    const ModelInput& input = model.inputs(i);
    const std::string path = Index("model.inputs", i);
    if (!IsEmbedded(input)) {
      if (input.shared_keys()) {
        mistakes->Add(path + ".shared_keys",
                      "only possible with embedding_table (true); false would be right");
      }
      continue;
    }
    used.insert(input.embedding_table());
    if (FindEmbeddingTable(model, input.embedding_table()) < 0) {
      mistakes->Add(path + ".embedding_table",
                    absl::StrCat("no such table (", input.embedding_table(), "); ",
                                 TableNames(model), " would be right"));
    }
    if (input.dtype() != DT_INT64 && !mistakes->HasWithin(path + ".dtype")) {
      mistakes->Add(path + ".dtype",
                    absl::StrCat("keys of an embedding table are integers (",
                                 DataType_Name(input.dtype()), "); DT_INT64 would be right"));
    }
  }
  std::set<std::string> names;
  for (int i = 0; i < model.embedding_tables_size(); ++i) {
    const EmbeddingTableConfig& table = model.embedding_tables(i);
    const std::string path = Index("model.embedding_tables", i);
    CheckTable(table, job.training().update_mode() == TrainingConfig::SYNC, path, mistakes);
    if (table.name().empty()) continue;
    if (!names.insert(table.name()).second) {
      mistakes->Add(path + ".name",
                    absl::StrCat("used twice (", table.name(), "); unique names would be right"));
    } else if (used.count(table.name()) == 0) {
      mistakes->Add(path + ".name",
                    absl::StrCat("no input has rows of it (", table.name(),
                                 "); embedding_table of one of model.inputs would be right"));
    }
  }
}

}  // namespace internal
}  // namespace codistill
