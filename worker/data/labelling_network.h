#ifndef CODISTILL_WORKER_DATA_LABELLING_NETWORK_H_
#define CODISTILL_WORKER_DATA_LABELLING_NETWORK_H_

#include <cstdint>
#include <vector>

#include "proto/job.pb.h"

namespace codistill {

// The network that labels synthetic data: tanh layers without biases, weights normal with variance
// 1 / (inputs of the layer); the last layer, without tanh, gives the logits. A function of the
// configuration's seed and widths alone. Immutable, thread-safe.
class LabellingNetwork {
 public:
  explicit LabellingNetwork(const SyntheticConfig& config);

  // Room for one layer's values; one object a thread.
  struct Scratch {
    std::vector<float> from, to;
  };
  // Logits of one example of config.inputs() values, valid until the next call with this scratch.
  const std::vector<float>& Logits(const float* x, Scratch* scratch) const;

 private:
  std::vector<int64_t> widths_;
  std::vector<std::vector<float>> weights_;  // by layer, [inputs, outputs]
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_LABELLING_NETWORK_H_
