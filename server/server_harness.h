#ifndef CODISTILL_SERVER_SERVER_HARNESS_H_
#define CODISTILL_SERVER_SERVER_HARNESS_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/client/leader_client.h"
#include "common/client/tensor_client.h"
#include "common/config/shard_map.h"
#include "common/rpc/server.h"
#include "gtest/gtest.h"
#include "server/parameter_server.h"
#include "server/test_model.h"

// For tests: real services over real sockets in one process: two shards, their leader, and clients
// that play the workers.
namespace codistill {

inline absl::Time Soon() { return absl::Now() + absl::Seconds(20); }

inline bool Eventually(const std::function<bool()>& condition) {
  for (const absl::Time end = Soon(); absl::Now() < end; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return condition();
}

// A parameter server and the sockets it is served on.
struct Node {
  std::unique_ptr<ParameterServer> server;
  std::unique_ptr<RpcServer> rpc;

  void Stop() {
    if (rpc != nullptr) rpc->Shutdown(absl::Now() + absl::Seconds(1));
    rpc.reset();
    server.reset();
  }
};

// The model as one worker holds it.
struct WorkerModel {
  explicit WorkerModel(const ShardMap& map) {
    for (const TensorSpec& spec : map.tensors()) {
      const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
      tensors.push_back(Tensor::Zeros(spec.dtype(), shape));
      TensorView view;
      view.name = spec.name();
      view.dtype = spec.dtype();
      view.shape = shape;
      view.data = tensors.back().data();
      views.push_back(view);
    }
  }
  float At(int tensor, int64_t i) { return tensors[tensor].As<float>()[i]; }

  std::vector<Tensor> tensors;
  std::vector<TensorView> views;
};

class ServerTest : public testing::Test {
 protected:
  static constexpr int kShards = 2;
  static constexpr int kWorkers = 2;

  void SetUp() override {
    directory_ = JoinPath(testing::TempDir(), "server",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(WriteTestModel(directory_));
    job_ = TestJob(directory_, kShards, kWorkers);
    map_ = BuildShardMap(TestTensors(), kShards).value();
    for (int s = 0; s < kShards; ++s) job_.mutable_groups(0)->add_shards();
    group_.set_run_id("run-7");
    group_.set_group("alpha");
  }

  void TearDown() override {
    for (Node& node : nodes_) node.Stop();
  }

  void StartNode(int shard, const std::string& address = "127.0.0.1:0") {
    ParameterServer::Options options;
    options.job = job_;
    options.shard = shard;
    auto server = ParameterServer::Create(options);
    ASSERT_TRUE(server.ok()) << server.status();
    nodes_[shard].server = *std::move(server);
    RpcServer::Options rpc;
    rpc.address = address;
    rpc.services = nodes_[shard].server->services();
    rpc.bulk = nodes_[shard].server->bulk();
    rpc.registries = nodes_[shard].server->registries();
    auto listening = RpcServer::Start(rpc);
    ASSERT_TRUE(listening.ok()) << listening.status();
    nodes_[shard].rpc = *std::move(listening);
    nodes_[shard].server->Start(nodes_[shard].rpc->address());
  }

  void Start() {
    StartNode(1);
    job_.mutable_groups(0)->mutable_shards(1)->set_address(nodes_[1].rpc->address());
    StartNode(0);
    leader_ = LeaderClient::Create(nodes_[0].rpc->address(), group_);
  }

  RegisterReply Register(int rank, uint64_t process = 0) {
    RegisterRequest request;
    request.set_rank(rank);
    request.set_process_nonce(process == 0 ? 50 + rank : process);
    *request.mutable_tensors() = TestTensors().tensors();
    absl::StatusOr<RegisterReply> reply;
    EXPECT_TRUE(Eventually([&] {
      reply = leader_->Register(request, Soon());
      return reply.ok();
    })) << reply.status();
    return *reply;
  }

  std::unique_ptr<TensorClient> Client(const RegisterReply& reply,
                                       DataType transfer_dtype = DT_FLOAT,
                                       DataType push_dtype = DT_FLOAT) {
    TensorClient::Options options;
    options.transfer_dtype = transfer_dtype;
    options.push_dtype = push_dtype;
    options.group = group_;
    options.shard_map = reply.shard_map();
    options.shard_addresses = {reply.shard_addresses().begin(), reply.shard_addresses().end()};
    auto client = TensorClient::Create(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return *std::move(client);
  }

  // Pushes the same gradient everywhere; buffers: mean as given, count of the rank.
  absl::StatusOr<PushStream::Result> Push(TensorClient* client, const RegisterReply& as, int rank,
                                          int64_t step, float gradient, int64_t examples,
                                          float mean) {
    TensorClient::PushHeader header;
    header.generation = as.generation();
    header.step = step;
    header.rank = rank;
    header.incarnation = as.incarnation();
    header.weights_step = step - 1;
    auto push = client->StartPush(header, Soon());
    for (int i = 0; i < map_.tensors_size(); ++i) {
      const TensorSpec& spec = map_.tensors(i);
      Tensor tensor = Tensor::Zeros(spec.dtype(),
                                    std::vector<int64_t>(spec.shape().begin(), spec.shape().end()));
      if (spec.role() == TensorSpec::PARAMETER) {
        for (float& g : tensor.As<float>()) g = gradient;
        push->AddGradient(i, tensor.As<float>().data(), tensor.owner());
      } else if (spec.role() == TensorSpec::BUFFER) {
        if (spec.dtype() == DT_INT64) {
          tensor.As<int64_t>()[0] = 100 + rank;
        } else {
          for (float& m : tensor.As<float>()) m = mean;
        }
        push->AddBuffer(i, tensor.data(), tensor.owner());
      }
    }
    PushEnd end;
    end.set_num_examples(examples);
    end.set_num_labels(examples);
    end.set_label_loss_sum(2.0 * static_cast<double>(examples));
    return push->Finish(end);
  }

  std::string directory_;
  JobConfig job_;
  ShardMap map_;
  GroupRef group_;
  Node nodes_[kShards];
  std::unique_ptr<LeaderClient> leader_;
};

}  // namespace codistill

#endif  // CODISTILL_SERVER_SERVER_HARNESS_H_
