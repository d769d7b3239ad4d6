// What publishing costs a shard that trains, and how fast a checkpoint is written.
//
// A model of 1 GB (ResNet-50-like tensors) on one shard takes SGD steps, each from one staged push.
// Blocks of 50 steps with a cut at their beginning alternate with blocks without. A follower on
// the other core copies every cut out while the steps go on, as a prediction server does, and
// compares every element with what that version must have. `step_delay_ratio` is the 95th
// percentile of the step times (with the time of publishing) with cuts over that without.
//
// Then snapshots are written as checkpoint files, in alternation with the same bytes written
// plainly, in pieces of 1 MiB, and fsynced: `write_vs_fsync` is the median ratio of the rates.
//
// Weights and gradients are small multiples of a power of two, so that every version is known
// exactly.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/mutex.h"
#include "common/checkpoint/shard_file.h"
#include "common/config/shard_map.h"
#include "server/pull_source.h"
#include "server/shard_store.h"
#include "tests/benchmarks/harness.h"

namespace codistill {
namespace {

constexpr int kStepsPerBlock = 50;
constexpr float kUnit = 1.0f / 4096;

void Die(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// In units: what element `i` of tensor `t` begins with, and what each step takes off.
int First(uint32_t t, int64_t i) {
  return static_cast<int>((i * 2654435761u + t * 97) >> 7 & 2047);
}
int Slope(uint32_t t, int64_t i) { return static_cast<int>((i * 40503u + t * 31) >> 3 & 3); }

// Elements of tensor `t` from `begin` that are not those of `step`.
int64_t Wrong(uint32_t t, int64_t begin, int64_t count, int64_t step, const float* values) {
  int64_t wrong = 0;
  const int s = static_cast<int>(step);
  for (int64_t i = 0; i < count; ++i) {
    const int units = First(t, begin + i) - s * Slope(t, begin + i);
    wrong += values[i] != static_cast<float>(units) * kUnit ? 1 : 0;
  }
  return wrong;
}

class Publish {
 public:
  Publish(int64_t elements, int rounds) : rounds_(rounds), follower_copy_(elements) {
    TensorList tensors;
    for (int64_t size : ResNet50LikeSizes(elements)) {
      TensorSpec* const spec = tensors.add_tensors();
      spec->set_name(absl::StrCat("t", tensors.tensors_size()));
      spec->add_shape(size);
      spec->set_dtype(DT_FLOAT);
      spec->set_role(TensorSpec::PARAMETER);
    }
    ShardStore::Options options;
    options.map = BuildShardMap(tensors, 1).value();
    options.optimizer.set_kind(OptimizerConfig::SGD);
    store_ = ShardStore::Create(options).value();
    push_ = store_->NewPush(PushBegin());
    // The first step makes the initial weights: 0 - (-1) * first.
    FillPush([](uint32_t t, int64_t i) { return static_cast<float>(First(t, i)) * kUnit; });
    store_->Apply({0, -1.0, 0, 1, {}}, {{push_.get(), 1}});
    FillPush([](uint32_t t, int64_t i) { return static_cast<float>(Slope(t, i)); });
  }

  uint64_t bytes() const { return store_->values_bytes(); }

  // One block of steps; appends their times. The first step of the next block is made by a caller
  // that may have published.
  void Steps(bool publish, bool follow, std::vector<double>* times) {
    std::thread follower;
    for (int i = 0; i < kStepsPerBlock; ++i) {
      times->push_back(Seconds([&] {
        ++step_;
        store_->Apply({step_, kUnit, 0, 1, {}}, {{push_.get(), 1}});
        if (publish && i == 0) store_->Publish(step_);
      }));
      if (publish && follow && i == 0) {
        follower = std::thread([this, cut = store_->FindCut(step_)] { Follow(cut); });
      }
    }
    if (follower.joinable()) follower.join();
  }

  void StepsWithCuts() {
    std::vector<double> warm_up;
    for (int i = 0; i < 3; ++i) Steps(true, true, &warm_up);  // touches all pages there will be
    const auto block = [this](bool publish, bool follow, std::vector<double>* times) {
      return [=] {
        Steps(publish, follow, times);
        return 0.0;
      };
    };
    Alternate(rounds_, {{"without", block(false, false, &without_)},
                        {"with", block(true, true, &with_)},
                        {"no reader", block(true, false, &no_reader_)}});
  }

  void Checkpoints(const std::string& directory) {
    if (const absl::Status status = FileSystem::Real()->MakeDirs(directory); !status.ok()) {
      Die(std::string(status.message()));
    }
    store_->TakeSnapshot(step_);
    const auto snapshot = store_->snapshot(step_);
    const auto results =
        Alternate(rounds_, {{"checkpoint", [&] { return WriteCheckpoint(*snapshot, directory); }},
                            {"plain", [&] { return WritePlainly(*snapshot, directory); }}});
    checkpoint_seconds_ = results.at("checkpoint");
    plain_seconds_ = results.at("plain");
    // What writing does to the steps beside it.
    std::vector<double> quiet, beside;
    Steps(false, false, &quiet);
    std::thread writer([&] {
      if (!PinToCore(1).ok()) Die("no core 1");
      for (int i = 0; i < 3; ++i) WriteCheckpoint(*snapshot, directory);
    });
    Steps(false, false, &beside);
    writer.join();
    steps_beside_writing_ratio_ = Median(beside) / Median(quiet);
    store_->DropSnapshot(snapshot->label);
  }

  // The limits of this memory, for whoever reads the step times.
  void Baselines() {
    PrefaultedArray from(follower_copy_.size() / 4), to(from.size());
    for (int i = 0; i < rounds_; ++i) {
      memcpy_.push_back(MemcpyGbps(&to, from));
      scale_.push_back(ScaleInPlaceGbps(&to));
    }
  }

  nlohmann::ordered_json Report() const {
    nlohmann::ordered_json report =
        NewReport("publish", rounds_, "steps and checkpoints on core 0, the follower on core 1");
    const auto times = [](const std::vector<double>& samples) {
      return nlohmann::ordered_json{{"p50_ms", Median(samples) * 1e3},
                                    {"p95_ms", Percentile(samples, 0.95) * 1e3},
                                    {"p99_ms", Percentile(samples, 0.99) * 1e3},
                                    {"max_ms", Percentile(samples, 1) * 1e3}};
    };
    const double gb = static_cast<double>(bytes()) / 1e9;
    report["model_bytes"] = bytes();
    report["tensors"] = store_->layout().pieces().size();
    report["optimizer"] = "SGD";
    report["threads"] = 1;
    report["steps_a_block"] = kStepsPerBlock;
    report["steps_without"] = times(without_);
    report["steps_with_cuts"] = times(with_);
    report["steps_with_cuts_no_reader"] = times(no_reader_);
    report["step_delay_ratio"] = Percentile(with_, 0.95) / Percentile(without_, 0.95);
    report["step_delay_ratio_no_reader"] =
        Percentile(no_reader_, 0.95) / Percentile(without_, 0.95);
    report["cuts_followed"] = cuts_followed_;
    report["elements_wrong"] = wrong_;
    report["checkpoint_gbps"] = gb / Median(checkpoint_seconds_);
    report["plain_fsync_gbps"] = gb / Median(plain_seconds_);
    report["write_vs_fsync"] = MedianRatio(plain_seconds_, checkpoint_seconds_);
    report["median_step_beside_writing_ratio"] = steps_beside_writing_ratio_;
    // SGD reads two numbers and writes one.
    report["step_gbps"] = 3 * gb / Median(without_);
    report["memcpy_gbps"] = Median(memcpy_);
    report["scale_in_place_gbps"] = Median(scale_);
    const ShardStore::Memory memory = store_->memory();
    report["live_bytes"] = memory.live_bytes;
    report["allocated_bytes"] = memory.allocated_bytes;
    return report;
  }
  int64_t wrong() const { return wrong_; }

 private:
  void FillPush(const std::function<float(uint32_t, int64_t)>& value) {
    push_ = store_->NewPush(PushBegin());
    for (const ShardPiece& piece : store_->layout().pieces()) {
      TensorChunk chunk;
      chunk.set_tensor(piece.piece.tensor());
      chunk.set_begin(piece.piece.begin());
      chunk.set_count(piece.piece.count());
      chunk.set_dtype(piece.dtype);
      chunk.set_content(TensorChunk::GRADIENT);
      auto* const to = static_cast<float*>(push_->Place(chunk, piece.bytes).value());
      for (int64_t i = 0; i < piece.piece.count(); ++i) {
        to[i] = value(piece.piece.tensor(), piece.piece.begin() + i);
      }
    }
  }

  // Copies a cut out, frame by frame, then compares.
  void Follow(const std::shared_ptr<const Cut>& cut) {
    if (!PinToCore(1).ok()) Die("no core 1");
    PullSource source(std::shared_ptr<const ShardStore>(std::shared_ptr<void>(), store_.get()), cut,
                      Version(), {}, BlockPool::kMaxBlockBytes);
    std::vector<TensorChunk> chunks;
    float* to = follower_copy_.data();
    for (int64_t i = 0; i < source.num_blocks(); ++i) {
      const auto block = source.Read(i);
      if (!block.ok()) Die(std::string(block.status().message()));
      std::memcpy(to, block->data, block->bytes);
      to += block->bytes / sizeof(float);
      chunks.push_back(block->chunk);
    }
    const float* from = follower_copy_.data();
    for (const TensorChunk& chunk : chunks) {
      wrong_ += Wrong(chunk.tensor(), chunk.begin(), chunk.count(), cut->step(), from);
      from += chunk.count();
    }
    if (from != follower_copy_.data() + follower_copy_.size()) Die("a cut is not whole");
    ++cuts_followed_;
  }

  double WriteCheckpoint(const ShardStore::Snapshot& snapshot, const std::string& directory) {
    CheckpointShardHeader identity;
    identity.set_group("benchmark");
    identity.mutable_version()->set_step(snapshot.step);
    absl::StatusOr<CheckpointFile> file;
    const double seconds = Seconds([&] {
      file = store_->WriteSnapshot(snapshot, directory, "checkpoint", identity, FileSystem::Real());
    });
    if (!file.ok()) Die(std::string(file.status().message()));
    if (!verified_file_) CheckFile(directory, *file, snapshot.step);
    verified_file_ = true;
    Remove(JoinPath(directory, "checkpoint"));
    return seconds;
  }

  void CheckFile(const std::string& directory, const CheckpointFile& file, int64_t step) {
    if (const absl::Status status = VerifyCheckpointFile(directory, file); !status.ok()) {
      Die(std::string(status.message()));
    }
    const auto reader = ShardFileReader::Open(JoinPath(directory, file.name())).value();
    std::vector<float> values;
    for (int i = 0; i < reader->header().entries_size(); ++i) {
      const Piece& piece = reader->header().entries(i).piece();
      values.resize(piece.count());
      if (const absl::Status status = reader->Read(i, values.data()); !status.ok()) {
        Die(std::string(status.message()));
      }
      wrong_ += Wrong(piece.tensor(), piece.begin(), piece.count(), step, values.data());
    }
  }

  // The same bytes from the same blocks, in large pieces, without any sum.
  double WritePlainly(const ShardStore::Snapshot& snapshot, const std::string& directory) {
    const std::string path = JoinPath(directory, "plain");
    const double seconds = Seconds([&] {
      const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
      if (fd < 0) Die("open");
      for (size_t i = 0; i < snapshot.values.size(); ++i) {
        const uint8_t* from = snapshot.values[i].data();
        for (size_t left =
                 std::min<uint64_t>(store_->block_bytes(), bytes() - i * store_->block_bytes());
             left > 0;) {
          const ssize_t n = write(fd, from, left);
          if (n <= 0) Die("write");
          from += n;
          left -= static_cast<size_t>(n);
        }
      }
      if (fsync(fd) != 0 || close(fd) != 0) Die("fsync");
    });
    Remove(path);
    return seconds;
  }

  // Outside the times: freeing the disk's blocks must not fall into the next contestant's.
  static void Remove(const std::string& path) {
    if (!FileSystem::Real()->RemoveFile(path).ok()) Die("remove");
    ::sync();
  }

  const int rounds_;
  std::unique_ptr<ShardStore> store_;
  std::shared_ptr<StagedPush> push_;
  int64_t step_ = 0;
  PrefaultedArray follower_copy_;
  std::vector<double> without_, with_, no_reader_;
  std::vector<double> memcpy_, scale_, checkpoint_seconds_, plain_seconds_;
  double steps_beside_writing_ratio_ = 0;
  bool verified_file_ = false;
  int64_t cuts_followed_ = 0, wrong_ = 0;  // by the follower, which is joined before they are read
};

int Main(bool quick) {
  RetainHeap();
  if (!PinToCore(0).ok()) Die("no core 0");
  const char* const tmp = std::getenv("TEST_TMPDIR");
  // Values stay exact for 2^24 / 3 steps.
  Publish publish(quick ? 64'000'000 : 250'000'000, quick ? 3 : 10);
  publish.StepsWithCuts();
  publish.Baselines();
  publish.Checkpoints(JoinPath(tmp == nullptr ? "." : tmp, "publish"));
  const nlohmann::ordered_json report = publish.Report();
  PrintReport(report);
  return publish.wrong() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  return codistill::Main(argc > 1 && std::strcmp(argv[1], "--quick") == 0);
}
