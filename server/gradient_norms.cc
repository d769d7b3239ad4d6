#include "server/gradient_norms.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>

namespace codistill {

std::vector<TensorNorm> SumOverShards(absl::Span<const PrepareReply> shards) {
  std::map<uint32_t, TensorNorm> sums;
  for (const PrepareReply& shard : shards) {
    for (const TensorNorm& part : shard.norms()) {
      TensorNorm& sum = sums[part.tensor()];
      sum.set_tensor(part.tensor());
      sum.set_gradient_squared(sum.gradient_squared() + part.gradient_squared());
      sum.set_weight_squared(sum.weight_squared() + part.weight_squared());
    }
  }
  std::vector<TensorNorm> norms;
  for (auto& sum : sums) norms.push_back(std::move(sum.second));
  return norms;
}

double GlobalNorm(absl::Span<const TensorNorm> norms) {
  double squared = 0;
  for (const TensorNorm& norm : norms) squared += norm.gradient_squared();
  return std::sqrt(squared);
}

double ClipScale(const OptimizerConfig& optimizer, double norm) {
  constexpr double kTorchEpsilon = 1e-6;
  if (!(optimizer.clip_norm() > 0)) return 1;
  return std::min(1.0, optimizer.clip_norm() / (norm + kTorchEpsilon));
}

}  // namespace codistill
