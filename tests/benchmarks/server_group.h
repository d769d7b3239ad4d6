#ifndef CODISTILL_TESTS_BENCHMARKS_SERVER_GROUP_H_
#define CODISTILL_TESTS_BENCHMARKS_SERVER_GROUP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "control/child_process.h"
#include "proto/job.pb.h"
#include "proto/parameter_server.pb.h"
#include "tests/benchmarks/pinned_process.h"

// Real parameter-server processes of one group, for benchmarks that push and pull.
namespace codistill {

// One rank: a registered member of the group with a connection of its own to every shard.
struct GroupWorker {
  int rank = 0;
  RegisterReply registered;
  std::unique_ptr<TensorClient> tensors;
};

class ServerGroup {
 public:
  struct Options {
    std::string name;
    std::string directory;  // of the model's files, job file and logs
    TrainingConfig training;
    // With tables the job reads keys from a text file, which no server opens.
    std::vector<EmbeddingTableConfig> tables;
    int num_shards = 1;
    int num_workers = 1;
    int server_core = 0;
    int client_core = 1;
    std::vector<std::string> flags;  // further ones of every server
  };
  // Writes fp32 parameters p0, p1, ... of the given sizes, with values InitialWeight, as the files
  // of a model, into `directory`: once for all groups that share it.
  static absl::Status WriteModel(const std::vector<int64_t>& sizes, const std::string& directory);
  static float InitialWeight(int64_t i) { return static_cast<float>(i % 1021) * 0.001f - 0.5f; }

  // Starts the shards and waits until the group takes members.
  static absl::StatusOr<std::unique_ptr<ServerGroup>> Start(Options options);
  ~ServerGroup();  // ends the processes

  absl::StatusOr<GroupWorker> Join(int rank);
  LeaderClient* leader() { return leader_.get(); }
  // Seed of the initial rows of an embedding table.
  uint64_t table_seed(int table) const { return table_seeds_[table]; }
  const GroupRef& ref() const { return ref_; }
  const std::string& address(int shard) const { return addresses_[shard]; }
  pid_t pid(int shard) const { return shards_[shard].pid(); }

 private:
  explicit ServerGroup(Options options) : options_(std::move(options)) {}

  const Options options_;
  GroupRef ref_;
  std::vector<uint64_t> table_seeds_;
  std::vector<ChildProcess> shards_;
  std::vector<std::string> addresses_;
  std::unique_ptr<LeaderClient> leader_;
};

// Views of consecutive ranges of `values` as the tensors of `map`.
std::vector<TensorView> ViewsOf(const ShardMap& map, absl::Span<float> values);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_SERVER_GROUP_H_
