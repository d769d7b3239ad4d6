#include "worker/data/example_order.h"

#include <optional>

#include "common/base/random.h"
#include "glog/logging.h"

namespace codistill {
namespace {

int64_t EpochSize(const ExampleOrder::Options& options) {
  if (options.sequential || options.partition == SAME) return options.size;
  return (options.size - options.group + options.num_groups - 1) / options.num_groups;
}

// Of one epoch's permutation. "order" keeps it apart from other uses of the same numbers.
uint64_t EpochSeed(const ExampleOrder::Options& options, int64_t epoch) {
  return Mix(options.seed, HashString("order"), options.group, epoch);
}

}  // namespace

ExampleOrder::ExampleOrder(const Options& options)
    : options_(options), epoch_size_(EpochSize(options)) {
  CHECK(options.group >= 0 && options.group < options.num_groups);
  CHECK_GT(epoch_size_, 0) << "group " << options.group << " has no example of " << options.size;
}

ExampleRef ExampleOrder::At(uint64_t position) const { return Range(position, 1)[0]; }

std::vector<ExampleRef> ExampleOrder::Range(uint64_t first, int64_t count) const {
  std::vector<ExampleRef> refs;
  refs.reserve(count);
  std::optional<Permutation> permutation;
  for (uint64_t position = first; position < first + count; ++position) {
    ExampleRef ref;
    ref.epoch = static_cast<int64_t>(position / epoch_size_);
    const uint64_t place = position % epoch_size_;
    if (options_.sequential) {
      ref.index = static_cast<int64_t>(place);
    } else {
      if (!permutation || place == 0)
        permutation.emplace(EpochSeed(options_, ref.epoch), epoch_size_);
      ref.index = static_cast<int64_t>((*permutation)(place));
      if (options_.partition == DISJOINT) {
        ref.index = ref.index * options_.num_groups + options_.group;
      }
    }
    refs.push_back(ref);
  }
  return refs;
}

}  // namespace codistill
