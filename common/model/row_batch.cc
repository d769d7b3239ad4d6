#include "common/model/row_batch.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "common/base/random.h"
#include "common/config/embedding.h"

namespace codistill {
namespace {

// What is mixed into the keys of one column.
std::vector<uint64_t> ColumnSalts(const ModelInput& input, int64_t columns) {
  const uint64_t field = HashString(InputField(input));
  std::vector<uint64_t> salts(columns);
  for (int64_t c = 0; c < columns; ++c) salts[c] = Mix(field, static_cast<uint64_t>(c));
  return salts;
}

uint64_t Salted(uint64_t value, uint64_t salt) { return Mix(value, salt); }

}  // namespace

uint64_t RowKey(const ModelInput& input, int64_t value, int64_t column) {
  if (input.shared_keys()) return static_cast<uint64_t>(value);
  return Salted(static_cast<uint64_t>(value),
                Mix(HashString(InputField(input)), static_cast<uint64_t>(column)));
}

std::vector<RowBatch> FindRows(const ModelConfig& model, absl::Span<const Tensor> inputs) {
  std::vector<RowBatch> batches;
  for (int t = 0; t < model.embedding_tables_size(); ++t) {
    RowBatch batch;
    batch.table = t;
    batch.dim = model.embedding_tables(t).dim();
    absl::flat_hash_map<uint64_t, uint32_t> seen;
    for (int i = 0; i < model.inputs_size(); ++i) {
      const ModelInput& input = model.inputs(i);
      if (input.embedding_table() != model.embedding_tables(t).name()) continue;
      const auto values = inputs[i].As<int64_t>();
      const int64_t columns =
          inputs[i].shape()[0] > 0 ? inputs[i].elements() / inputs[i].shape()[0] : 0;
      std::vector<uint64_t> salts;
      if (!input.shared_keys()) salts = ColumnSalts(input, columns);
      RowBatch::Use use;
      use.input = i;
      use.index.reserve(values.size());
      int64_t column = 0;
      for (const int64_t value : values) {
        const auto bits = static_cast<uint64_t>(value);
        const uint64_t key = salts.empty() ? bits : Salted(bits, salts[column]);
        if (++column == columns) column = 0;
        const auto [it, is_new] = seen.emplace(key, static_cast<uint32_t>(batch.keys.size()));
        if (is_new) batch.keys.push_back(key);
        use.index.push_back(it->second);
      }
      batch.uses.push_back(std::move(use));
    }
    if (!batch.uses.empty()) batches.push_back(std::move(batch));
  }
  return batches;
}

std::vector<Tensor> GatherRows(absl::Span<const Tensor> inputs, absl::Span<const RowBatch> batches,
                               absl::Span<const float* const> rows) {
  std::vector<Tensor> forward(inputs.begin(), inputs.end());
  for (size_t b = 0; b < batches.size(); ++b) {
    const int64_t dim = batches[b].dim;
    for (const RowBatch::Use& use : batches[b].uses) {
      std::vector<int64_t> shape = inputs[use.input].shape();
      shape.push_back(dim);
      Tensor gathered = Tensor::Allocate(DT_FLOAT, std::move(shape));
      float* to = gathered.As<float>().data();
      for (const uint32_t row : use.index) {
        std::memcpy(to, rows[b] + row * dim, dim * sizeof(float));
        to += dim;
      }
      forward[use.input] = std::move(gathered);
    }
  }
  return forward;
}

Tensor ScatterGradients(const RowBatch& batch, absl::Span<const Tensor> of_inputs) {
  Tensor sums = Tensor::Zeros(DT_FLOAT, {static_cast<int64_t>(batch.keys.size()), batch.dim});
  float* const to = sums.As<float>().data();
  for (const RowBatch::Use& use : batch.uses) {
    const float* from = of_inputs[use.input].As<float>().data();
    for (const uint32_t row : use.index) {
      float* const sum = to + row * batch.dim;
      for (int64_t d = 0; d < batch.dim; ++d) sum[d] += from[d];
      from += batch.dim;
    }
  }
  return sums;
}

}  // namespace codistill
