// How fast a shard's store takes a step, beside `x *= c` in place over as many bytes.
//
//   optimizers [--quick]
//
// Bytes are counted where they are read and where they are written: weights, slots and gradient,
// once each. The figure is `ratio_min`, the smallest median ratio over optimizers and numbers of
// threads. Every element of weights and slots is checked against double precision after the rounds.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/file_system.h"
#include "common/config/shard_map.h"
#include "server/optimizer_reference.h"
#include "server/shard_store.h"
#include "server/test_model.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

constexpr int64_t kElements = int64_t{32} << 20;
constexpr double kRate = 1e-3, kDecay = 1e-2;
constexpr OptimizerConfig::Kind kKinds[] = {OptimizerConfig::SGD, OptimizerConfig::MOMENTUM,
                                            OptimizerConfig::ADAGRAD, OptimizerConfig::ADAM};

template <typename T>
T MustHave(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(value);
}

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

// One shard's store of ResNet-50-like tensors with a push for it.
class Subject {
 public:
  Subject(OptimizerConfig::Kind kind, int threads, const ShardMap& map,
          const std::string& weights) {
    config_.set_kind(kind);
    config_.set_initial_accumulator(0.1f);
    ShardStore::Options options;
    options.map = map;
    options.optimizer = config_;
    options.threads = threads;
    options.held_cuts = 1;
    store_ = MustHave(ShardStore::Create(std::move(options)));
    Must(store_->LoadInitial(weights, "", FileSystem::Real()));
    push_ = store_->NewPush(PushBegin());
    for (const ShardPiece& piece : store_->layout().pieces()) {
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_count(piece.piece.count());
      chunk.set_dtype(DT_FLOAT);
      chunk.set_content(TensorChunk::GRADIENT);
      float* const to = static_cast<float*>(MustHave(push_->Place(chunk, piece.bytes)));
      for (int64_t i = 0; i < piece.piece.count(); ++i) {
        to[i] = static_cast<float>((i * 7919 + piece.piece.tensor()) % 20011) / 10005.0f - 1.0f;
      }
    }
  }

  size_t num_slots() const { return store_->optimizer().SlotNames().size(); }

  // 1e9 bytes a second of one step.
  double Step() {
    const double seconds = Seconds([&] { Apply(); });
    return static_cast<double>(kElements) * sizeof(float) *
           (3.0 + 2.0 * static_cast<double>(num_slots())) / seconds / 1e9;
  }

  // One more step, in place, every element of which is compared with double precision. Returns the
  // largest distance in units of the last place of the largest term.
  double Verify() {
    const std::vector<std::vector<float>> before = State();
    Apply();
    const std::vector<std::vector<float>> after = State();
    double worst = 0;
    ReferenceElement element;
    element.config = config_;
    for (const ShardPiece& piece : store_->layout().pieces()) {
      const TensorSpec& spec = store_->layout().map().tensors(piece.piece.tensor());
      const Optimizer::Step step = {kRate, spec.shape_size() >= 2 ? kDecay : 0.0, step_, 1.0, 1.0};
      const float* const gradient = reinterpret_cast<const float*>(push_->data() + piece.offset);
      const size_t first = piece.offset / sizeof(float);
      for (size_t i = first; i < first + static_cast<size_t>(piece.piece.count()); ++i) {
        element.w = before[0][i];
        for (size_t s = 0; s < num_slots(); ++s) element.slots[s] = before[1 + s][i];
        element.Apply(gradient[i - first], step);
        worst = std::max(worst, UlpsApart(after[0][i], element.w, element.largest_w));
        for (size_t s = 0; s < num_slots(); ++s) {
          worst = std::max(worst,
                           UlpsApart(after[1 + s][i], element.slots[s], element.largest_slots[s]));
        }
      }
    }
    return worst;
  }

 private:
  void Apply() { store_->Apply({++step_, kRate, kDecay, 1.0, {}}, {{push_.get(), 1}}); }

  // Copies of values and slots; holds no block afterwards.
  std::vector<std::vector<float>> State() {
    store_->TakeSnapshot(step_);
    const auto snapshot = store_->snapshot(step_);
    store_->DropSnapshot(step_);
    std::vector<std::vector<float>> state;
    const auto copy = [&](const BlockArray& blocks) {
      const uint64_t bytes = store_->layout().buffer_bytes();
      std::vector<float> values(bytes / sizeof(float));
      for (size_t b = 0; b < blocks.size(); ++b) {
        const uint64_t at = b * store_->block_bytes();
        std::memcpy(reinterpret_cast<char*>(values.data()) + at, blocks[b].data(),
                    std::min(store_->block_bytes(), bytes - at));
      }
      state.push_back(std::move(values));
    };
    copy(snapshot->values);
    for (const BlockArray& slot : snapshot->slots) copy(slot);
    return state;
  }

  OptimizerConfig config_;
  std::unique_ptr<ShardStore> store_;
  std::shared_ptr<StagedPush> push_;
  int64_t step_ = 0;
};

ShardMap MapOfResNetLikeTensors() {
  TensorList tensors;
  const std::vector<int64_t> sizes = ResNet50LikeSizes(kElements);
  for (size_t i = 0; i < sizes.size(); ++i) {
    TensorSpec* spec = tensors.add_tensors();
    spec->set_name(absl::StrCat("t", i));
    spec->set_dtype(DT_FLOAT);
    spec->set_role(TensorSpec::PARAMETER);
    if (sizes[i] > 4096) spec->add_shape(1);  // the rank that takes weight decay
    spec->add_shape(sizes[i]);
  }
  return MustHave(BuildShardMap(tensors, 1));
}

int Main(bool quick) {
  RetainHeap();
  const int rounds = quick ? 5 : 15;
  const ShardMap map = MapOfResNetLikeTensors();
  const char* const tmp = std::getenv("TEST_TMPDIR");
  const std::string path = JoinPath(tmp == nullptr ? "/tmp" : tmp, "optimizers.safetensors");
  TensorList tensors;
  *tensors.mutable_tensors() = map.tensors();
  Must(WriteFileAtomically(path, SafetensorsBytes(tensors, [](int tensor, int64_t i) {
                             return static_cast<float>((i + tensor) * 104729 % 30011) / 30011.0f -
                                    0.5f;
                           })));

  nlohmann::ordered_json report =
      NewReport("optimizers", rounds, "1 thread: core 0; 2 threads: not pinned, one a core of two");
  report["elements"] = kElements;
  report["tensors"] = map.tensors_size();
  report["weight_megabytes"] = kElements * sizeof(float) / 1e6;
  double ratio_min = 1e30, worst = 0;
  // Two threads first: threads started after pinning would share the core.
  for (const int threads : {2, 1}) {
    double worst_here = 0;
    const auto measure = [&] {
      if (threads == 1) Must(PinToCore(0));
      PrefaultedArray x(2 * kElements), y(2 * kElements);
      std::fill(x.data(), x.data() + x.size(), 1.0f);
      std::vector<std::unique_ptr<Subject>> subjects;
      std::vector<Contestant> contestants;
      contestants.push_back({"scale", [&] { return ScaleInPlaceGbps(&x, threads); }});
      contestants.push_back({"memcpy", [&] { return MemcpyGbps(&y, x, threads); }});
      for (const OptimizerConfig::Kind kind : kKinds) {
        subjects.push_back(std::make_unique<Subject>(kind, threads, map, path));
        Subject* const subject = subjects.back().get();
        subject->Step();  // caches, pages, and slots that are more than their first values
        contestants.push_back(
            {OptimizerConfig::Kind_Name(kind), [subject] { return subject->Step(); }});
      }
      const std::map<std::string, std::vector<double>> rates = Alternate(rounds, contestants);
      nlohmann::ordered_json& figures = report[absl::StrCat("threads_", threads)];
      figures["scale_gbps"] = Median(rates.at("scale"));
      figures["memcpy_gbps"] = Median(rates.at("memcpy"));
      for (size_t i = 0; i < subjects.size(); ++i) {
        const std::string name = OptimizerConfig::Kind_Name(kKinds[i]);
        const double ratio = MedianRatio(rates.at(name), rates.at("scale"));
        const double ulps = subjects[i]->Verify();
        figures[name] = {{"gbps", Median(rates.at(name))}, {"ratio", ratio}, {"ulps", ulps}};
        std::printf("%d threads %-9s %6.2f GB/s, %.3f of x *= c, within %.2f ulps\n", threads,
                    name.c_str(), Median(rates.at(name)), ratio, ulps);
        std::fflush(stdout);
        ratio_min = std::min(ratio_min, ratio);
        worst_here = std::max(worst_here, ulps);
      }
    };
    std::thread(measure).join();
    worst = std::max(worst, worst_here);
  }
  Must(RemoveAll(path));
  report["ratio_min"] = ratio_min;
  report["max_ulps"] = worst;
  if (!(worst <= 8)) {
    std::fprintf(stderr, "an element is %g ulps from double precision: void\n", worst);
    return 1;
  }
  PrintReport(report);
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
}
