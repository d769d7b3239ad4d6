#ifndef CODISTILL_SERVER_GRADIENT_NORMS_H_
#define CODISTILL_SERVER_GRADIENT_NORMS_H_

#include <vector>

#include "absl/types/span.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"

// What a step must know of its gradient before it is taken: the norm of all of it, for clipping,
// and those of whole tensors, for LARS. Shards have parts of tensors and parts of gradients, so the
// leader asks them (Shard.Prepare) and adds up.
namespace codistill {

inline bool NeedsTensorNorms(const OptimizerConfig& optimizer) {
  return optimizer.kind() == OptimizerConfig::LARS;
}
inline bool NeedsNorms(const OptimizerConfig& optimizer) {
  return optimizer.clip_norm() > 0 || NeedsTensorNorms(optimizer);
}

// Norms of whole tensors, by index, from those of each shard, added in the order given: the result
// is the same whoever answered first.
std::vector<TensorNorm> SumOverShards(absl::Span<const PrepareReply> shards);

// Euclidean norm of the whole gradient.
double GlobalNorm(absl::Span<const TensorNorm> norms);

// Factor on a gradient of this Euclidean norm so that it has at most clip_norm, as
// torch.nn.utils.clip_grad_norm_ works it out; 1 without clipping.
double ClipScale(const OptimizerConfig& optimizer, double norm);

}  // namespace codistill

#endif  // CODISTILL_SERVER_GRADIENT_NORMS_H_
