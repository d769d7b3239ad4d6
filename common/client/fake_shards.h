#ifndef CODISTILL_COMMON_CLIENT_FAKE_SHARDS_H_
#define CODISTILL_COMMON_CLIENT_FAKE_SHARDS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/base/mutex.h"
#include "common/client/shard_layout.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// For tests: the shards of a group, each a real server on loopback. Cuts are given as whole
// tensors; pushes are kept for inspection. Misbehaves on request. Messages are written and read as
// plain protobuf. Thread-safe.
class FakeShards {
 public:
  explicit FakeShards(const ShardMap& map, bool shared_memory = false);
  ~FakeShards();

  const std::vector<std::string>& addresses() const { return addresses_; }

  // Bytes of every tensor of the map, by index.
  using Cut = std::vector<std::string>;
  void Put(uint64_t generation, int64_t step, Cut cut);
  void Remove(uint64_t generation, int64_t step);
  int pulls() const;

  // Called for each frame of a pull, of shard `shard`; may change it. False: the frame is left out.
  using FrameFilter = std::function<bool(int shard, int index, TensorFrame* frame)>;
  void set_pull_filter(FrameFilter filter);
  // Pulls are accepted and never answered.
  void set_hang(bool hang);

  struct Push {
    PushBegin begin;
    std::map<uint32_t, std::map<int64_t, std::string>> gradients;  // tensor -> element -> bytes
    std::map<uint32_t, std::map<int64_t, std::string>> values;
    std::string worker_state;
    PushEnd end;
    bool ended = false;
    uint64_t bytes = 0;  // of all messages
    int64_t largest_payload = 0;
  };
  std::vector<Push> pushes(int shard) const;

  // Called at each frame of a push; a non-null result is the answer. Default: APPLIED at END.
  struct Answer {
    absl::Status status;
    PushReply reply;
  };
  using OnPushFrame =
      std::function<std::unique_ptr<Answer>(int shard, const TensorFrame& frame, const Push& push)>;
  void set_on_push_frame(OnPushFrame on_push_frame);
  // Pushes that ended without an answer of ours.
  int cancelled_pushes() const;

 private:
  class PullHandler;
  class PushHandler;
  struct Server;

  const ShardLayout layout_;
  std::vector<std::string> addresses_;

  mutable Mutex mu_;
  std::map<std::pair<uint64_t, int64_t>, Cut> cuts_ ABSL_GUARDED_BY(mu_);
  FrameFilter filter_ ABSL_GUARDED_BY(mu_);
  bool hang_ ABSL_GUARDED_BY(mu_) = false;
  int pulls_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::vector<Push>> pushes_ ABSL_GUARDED_BY(mu_);
  OnPushFrame on_push_frame_ ABSL_GUARDED_BY(mu_);
  int cancelled_pushes_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::unique_ptr<Server>> servers_;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_FAKE_SHARDS_H_
