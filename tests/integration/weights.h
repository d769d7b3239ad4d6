#ifndef CODISTILL_TESTS_INTEGRATION_WEIGHTS_H_
#define CODISTILL_TESTS_INTEGRATION_WEIGHTS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/client/tensor_client.h"
#include "common/tensor/tensor.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// Every tensor of a group at one version, in shard-map order, read from its shards.
struct Weights {
  Version version;
  std::vector<NamedTensor> tensors;

  // Null if there is none of that name.
  const Tensor* Find(const std::string& name) const;
};

// Reads all tensors of a group. `state` is what its leader says of itself: shard map and addresses.
absl::StatusOr<Weights> PullWeights(const GroupRef& group, const GroupState& state,
                                    TensorClient::Source source, int64_t step, absl::Time deadline);

// Name of the first tensor whose bytes differ, with the first element and both values; empty if all
// bytes of all tensors are the same.
std::string FirstBitDifference(const Weights& a, const Weights& b);

// Largest |a - b| of any element over the largest |a| of its tensor, over all FP32 tensors. Ends
// the program if the two are not the same model.
double RelativeDifference(const Weights& a, const Weights& b);

// The values of a safetensors file, as if they had been pulled.
absl::StatusOr<Weights> ReadSafetensors(const std::string& path);

// Copies values into a model's own storage by name. NOT_FOUND names a tensor the weights lack.
absl::Status CopyInto(const Weights& weights, absl::Span<const TensorView> storage);

}  // namespace codistill

#endif  // CODISTILL_TESTS_INTEGRATION_WEIGHTS_H_
