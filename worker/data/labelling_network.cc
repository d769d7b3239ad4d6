#include "worker/data/labelling_network.h"

#include <cmath>
#include <utility>

#include "common/base/random.h"

namespace codistill {

LabellingNetwork::LabellingNetwork(const SyntheticConfig& config) {
  widths_.push_back(config.inputs());
  widths_.insert(widths_.end(), config.hidden().begin(), config.hidden().end());
  widths_.push_back(config.classes());
  for (size_t layer = 0; layer + 1 < widths_.size(); ++layer) {
    const int64_t inputs = widths_[layer];
    std::vector<float> weights(inputs * widths_[layer + 1]);
    const double deviation = 1 / std::sqrt(static_cast<double>(inputs));
    const uint64_t seed = Mix(config.seed(), HashString("labelling network"), layer);
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i] = static_cast<float>(deviation * NormalDouble(Mix(seed, i)));
    }
    weights_.push_back(std::move(weights));
  }
}

const std::vector<float>& LabellingNetwork::Logits(const float* x, Scratch* scratch) const {
  scratch->from.assign(x, x + widths_[0]);
  for (size_t layer = 0; layer < weights_.size(); ++layer) {
    const int64_t inputs = widths_[layer], outputs = widths_[layer + 1];
    scratch->to.assign(outputs, 0);
    float* to = scratch->to.data();
    // Row by row of [inputs, outputs], so that the inner loop runs over memory and vectorises.
    for (int64_t i = 0; i < inputs; ++i) {
      const float value = scratch->from[i];
      const float* row = weights_[layer].data() + i * outputs;
      for (int64_t o = 0; o < outputs; ++o) to[o] += value * row[o];
    }
    if (layer + 1 < weights_.size()) {
      for (int64_t o = 0; o < outputs; ++o) to[o] = std::tanh(to[o]);
    }
    std::swap(scratch->from, scratch->to);
  }
  return scratch->from;
}

}  // namespace codistill
