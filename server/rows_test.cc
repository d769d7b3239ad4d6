// Rows of embedding tables over real sockets: pushed by workers, decided by the leader, applied by
// two shards, pulled by whoever asks.

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/file.h"
#include "common/base/random.h"
#include "common/client/leader_client.h"
#include "common/client/row_client.h"
#include "common/client/tensor_client.h"
#include "common/config/embedding.h"
#include "common/config/shard_map.h"
#include "common/embedding/default_row.h"
#include "common/embedding/row_placement.h"
#include "common/rpc/bulk_stream.h"
#include "common/rpc/channel.h"
#include "common/rpc/frame.h"
#include "common/rpc/server.h"
#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "server/embedding/reference_table.h"
#include "server/parameter_server.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

constexpr int kShards = 2;
constexpr uint64_t kLastKey = std::numeric_limits<uint64_t>::max();

absl::Time Soon() { return absl::Now() + absl::Seconds(20); }

bool Eventually(const std::function<bool()>& condition) {
  for (const absl::Time end = Soon(); absl::Now() < end; absl::SleepFor(absl::Milliseconds(5))) {
    if (condition()) return true;
  }
  return condition();
}

struct Rows {
  std::vector<uint64_t> keys;
  std::vector<float> gradients;
};

class RowsTest : public testing::Test {
 protected:
  // Two tables of 5 and 1 floats; the dense part is one tensor, w.
  void Start(TrainingConfig::UpdateMode mode, int workers) {
    directory_ = JoinPath(testing::TempDir(), "rows",
                          testing::UnitTest::GetInstance()->current_test_info()->name());
    ASSERT_TRUE(RemoveAll(directory_).ok());
    ASSERT_TRUE(FileSystem::Real()->MakeDirs(directory_).ok());
    google::protobuf::TextFormat::ParseFromString(
        R"pb(tensors { name: "w" shape: 4 dtype: DT_FLOAT role: PARAMETER })pb", &tensors_);
    std::string text;
    google::protobuf::TextFormat::PrintToString(tensors_, &text);
    ASSERT_TRUE(WriteFileAtomically(JoinPath(directory_, "alpha.tensors.textproto"), text).ok());
    ASSERT_TRUE(WriteFileAtomically(JoinPath(directory_, "alpha.safetensors"),
                                    SafetensorsBytes({{"w", {1, 2, 3, 4}}}))
                    .ok());
    job_ = TestJob(directory_, kShards, workers);
    job_.mutable_training()->set_update_mode(mode);
    google::protobuf::TextFormat::ParseFromString(
        R"pb(embedding_tables {
               name: "ads"
               dim: 5
               optimizer { kind: ADAGRAD learning_rate: 0.1 initial_accumulator: 0.1 }
             }
             embedding_tables {
               name: "wide"
               dim: 1
               init_scale: 0
               optimizer { kind: FTRL learning_rate: 0.2 l1: 0.01 }
             })pb",
        &tables_);
    job_.mutable_model()->MergeFrom(tables_);
    for (int s = 0; s < kShards; ++s) job_.mutable_groups(0)->add_shards();
    group_.set_run_id("run-7");
    group_.set_group("alpha");
    StartNode(1);
    job_.mutable_groups(0)->mutable_shards(1)->set_address(nodes_[1].rpc->address());
    StartNode(0);
    leader_ = LeaderClient::Create(nodes_[0].rpc->address(), group_);
    for (int rank = 0; rank < workers; ++rank) {
      RegisterRequest request;
      request.set_rank(rank);
      request.set_process_nonce(50 + rank);
      *request.mutable_tensors() = tensors_.tensors();
      absl::StatusOr<RegisterReply> reply;
      ASSERT_TRUE(Eventually([&] {
        reply = leader_->Register(request, Soon());
        return reply.ok();
      })) << reply.status();
      members_.push_back(*reply);
      TensorClient::Options options;
      options.group = group_;
      options.shard_map = reply->shard_map();
      options.shard_addresses = {reply->shard_addresses().begin(), reply->shard_addresses().end()};
      clients_.push_back(TensorClient::Create(options).value());
    }
    RowClient::Options options;
    options.group = group_;
    options.shard_map_digest = members_[0].shard_map_digest();
    options.shard_addresses = {members_[0].shard_addresses().begin(),
                               members_[0].shard_addresses().end()};
    rows_ = RowClient::Create(options).value();
  }

  void TearDown() override {
    rows_.reset();
    clients_.clear();
    for (Node& node : nodes_) {
      if (node.rpc != nullptr) node.rpc->Shutdown(absl::Now() + absl::Seconds(1));
      node.rpc.reset();
      node.server.reset();
    }
  }

  absl::StatusOr<PushStream::Result> Push(int rank, int64_t step, int64_t examples, const Rows& ads,
                                          const Rows& wide) {
    TensorClient::PushHeader header;
    header.generation = members_[rank].generation();
    header.step = step;
    header.rank = rank;
    header.incarnation = members_[rank].incarnation();
    header.weights_step = step - 1;
    auto push = clients_[rank]->StartPush(header, Soon());
    const auto w = std::make_shared<std::vector<float>>(4, 0.0f);
    push->AddRows(0, "ads", 5, ads.keys, ads.gradients.data());
    push->AddGradient(0, w->data(), w);
    push->AddRows(1, "wide", 1, wide.keys, wide.gradients.data());
    PushEnd end;
    end.set_num_examples(examples);
    end.set_num_labels(examples);
    return push->Finish(end);
  }

  absl::StatusOr<std::vector<float>> Pull(TensorClient::Source source, int64_t step, int table,
                                          int dim, const std::vector<uint64_t>& keys) {
    std::vector<float> rows(keys.size() * dim, NAN);
    RowClient::Request request;
    request.source = source;
    request.generation = members_[0].generation();
    request.step = step;
    request.table = table;
    request.dim = dim;
    request.keys = keys;
    request.rows = rows.data();
    const auto result = rows_->Pull(request, Soon());
    if (!result.ok()) return result.status();
    return rows;
  }

  // What a table of the whole group must be like.
  std::unique_ptr<ReferenceTable> Reference(int table) {
    EmbeddingTable::Options options;
    options.dim = static_cast<int>(job_.model().embedding_tables(table).dim());
    options.init.seed = EmbeddingSeed(job_, 0, table);
    const RowOptimizerConfig& optimizer = job_.model().embedding_tables(table).optimizer();
    options.init.scale = job_.model().embedding_tables(table).init_scale();
    options.optimizer.kind = optimizer.kind() == RowOptimizerConfig::FTRL
                                 ? RowOptimizer::Kind::kFtrl
                                 : RowOptimizer::Kind::kAdagrad;
    options.optimizer.epsilon = optimizer.epsilon();
    options.optimizer.initial_accumulator = optimizer.initial_accumulator();
    options.optimizer.l1 = optimizer.l1();
    return std::make_unique<ReferenceTable>(options);
  }

  static Rows RandomRows(RandomStream* random, size_t count, int dim) {
    Rows rows;
    std::map<uint64_t, bool> seen;
    while (rows.keys.size() < count) {
      uint64_t key = MixBits(random->Below(3 * count));
      if (rows.keys.empty()) key = random->Below(2) == 0 ? 0 : kLastKey;
      if (!seen.emplace(key, true).second) continue;
      rows.keys.push_back(key);
      for (int d = 0; d < dim; ++d) rows.gradients.push_back(random->Normal());
    }
    return rows;
  }

  struct Node {
    std::unique_ptr<ParameterServer> server;
    std::unique_ptr<RpcServer> rpc;
  };
  void StartNode(int shard) {
    ParameterServer::Options options;
    options.job = job_;
    options.shard = shard;
    auto server = ParameterServer::Create(options);
    ASSERT_TRUE(server.ok()) << server.status();
    nodes_[shard].server = *std::move(server);
    RpcServer::Options rpc;
    rpc.address = "127.0.0.1:0";
    rpc.services = nodes_[shard].server->services();
    rpc.bulk = nodes_[shard].server->bulk();
    rpc.registries = nodes_[shard].server->registries();
    auto listening = RpcServer::Start(rpc);
    ASSERT_TRUE(listening.ok()) << listening.status();
    nodes_[shard].rpc = *std::move(listening);
    nodes_[shard].server->Start(nodes_[shard].rpc->address());
  }

  std::string directory_;
  TensorList tensors_;
  ModelConfig tables_;
  JobConfig job_;
  GroupRef group_;
  Node nodes_[kShards];
  std::unique_ptr<LeaderClient> leader_;
  std::vector<RegisterReply> members_;
  std::vector<std::unique_ptr<TensorClient>> clients_;
  std::unique_ptr<RowClient> rows_;
};

// The mean of two ranks' rows, as ReferenceTable wants it.
Rows Mean(const Rows& a, float weight_a, const Rows& b, float weight_b, int dim) {
  Rows mean;
  std::map<uint64_t, size_t> places;
  const auto add = [&](const Rows& rows, float weight) {
    for (size_t i = 0; i < rows.keys.size(); ++i) {
      const auto found = places.emplace(rows.keys[i], mean.keys.size());
      if (found.second) {
        mean.keys.push_back(rows.keys[i]);
        mean.gradients.resize(mean.gradients.size() + dim, 0.0f);
      }
      for (int d = 0; d < dim; ++d) {
        mean.gradients[found.first->second * dim + d] += weight * rows.gradients[i * dim + d];
      }
    }
  };
  add(a, weight_a);
  add(b, weight_b);
  return mean;
}

TEST_F(RowsTest, SyncAppliesTheMeanOfAllRanksOnceOnAllShards) {
  Start(TrainingConfig::SYNC, 2);
  const std::unique_ptr<ReferenceTable> references[] = {Reference(0), Reference(1)};
  const int dims[] = {5, 1};
  RandomStream random(5);
  std::vector<uint64_t> asked;
  for (uint64_t i = 0; i < 9000; ++i) asked.push_back(MixBits(i));
  asked.push_back(kLastKey);
  for (int64_t step = 1; step <= 4; ++step) {
    // Enough rows for several frames a shard.
    const Rows ads[] = {RandomRows(&random, 3000, 5), RandomRows(&random, 50000, 5)};
    const Rows wide[] = {RandomRows(&random, 100, 1), RandomRows(&random, step == 2 ? 0 : 10, 1)};
    // Asked for before the step is made.
    absl::StatusOr<std::vector<float>> early;
    std::thread reader([&] { early = Pull(TensorClient::Source::kStep, step, 0, 5, asked); });
    std::thread other([&] {
      const auto result = Push(1, step, 1, ads[1], wide[1]);
      EXPECT_TRUE(result.ok() && result->outcome == APPLIED) << result.status();
    });
    const auto result = Push(0, step, 3, ads[0], wide[0]);
    EXPECT_TRUE(result.ok() && result->outcome == APPLIED) << result.status();
    other.join();
    reader.join();
    ASSERT_TRUE(early.ok()) << early.status();
    for (int t = 0; t < 2; ++t) {
      const Rows mean =
          t == 0 ? Mean(ads[0], 0.75f, ads[1], 0.25f, 5) : Mean(wide[0], 0.75f, wide[1], 0.25f, 1);
      references[t]->Apply({step, t == 0 ? 0.1f : 0.2f}, mean.keys, mean.gradients);
      const auto rows = Pull(TensorClient::Source::kStep, step, t, dims[t], asked);
      ASSERT_TRUE(rows.ok()) << rows.status();
      if (t == 0) {
        EXPECT_EQ(*rows, *early);
      }
      for (size_t i = 0; i < asked.size(); ++i) {
        const std::vector<float> want = references[t]->Row(asked[i]);
        for (int d = 0; d < dims[t]; ++d) {
          ASSERT_NEAR((*rows)[i * dims[t] + d], want[d], 1e-5)
              << "table " << t << ", key " << asked[i] << ", step " << step;
        }
      }
    }
    const auto late = Pull(TensorClient::Source::kStep, step - 1, 0, 5, {1});
    EXPECT_TRUE(absl::IsAborted(late.status())) << late.status();
  }
  // Every key lies on its own shard only.
  int64_t rows = 0;
  for (const Node& node : nodes_) {
    const int64_t own = node.server->shard()->embeddings()->table(0)->stats().rows;
    EXPECT_GT(own, 1000);
    rows += own;
  }
  EXPECT_EQ(rows, static_cast<int64_t>(references[0]->items().size()));
}

TEST_F(RowsTest, AsyncAppliesRowsAtTheEndOfAPush) {
  Start(TrainingConfig::ASYNC, 1);
  const auto reference = Reference(0);
  RandomStream random(6);
  for (int64_t step = 1; step <= 3; ++step) {
    const Rows ads = RandomRows(&random, 2000, 5);
    const auto result = Push(0, step, 8, ads, {});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->outcome, APPLIED);
    reference->Apply({step, 0.1f}, ads.keys, ads.gradients);
    const auto rows = Pull(TensorClient::Source::kAtLeastStep, step, 0, 5, ads.keys);
    ASSERT_TRUE(rows.ok()) << rows.status();
    for (size_t i = 0; i < ads.keys.size(); ++i) {
      const std::vector<float> got(rows->begin() + i * 5, rows->begin() + i * 5 + 5);
      ASSERT_EQ(got, reference->Row(ads.keys[i])) << ads.keys[i];
    }
  }
}

TEST_F(RowsTest, RowsThatAreNotFiniteAreRejectedByName) {
  Start(TrainingConfig::SYNC, 1);
  const auto before = Pull(TensorClient::Source::kStep, 0, 0, 5, {1, 2, 3});
  ASSERT_TRUE(before.ok()) << before.status();
  Rows bad = {{1, 2, 3}, std::vector<float>(15, 1.0f)};
  bad.gradients[7] = NAN;
  const auto result = Push(0, 1, 4, bad, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, REJECTED);
  EXPECT_THAT(result->message, HasSubstr("embedding table ads"));
  EXPECT_EQ(Pull(TensorClient::Source::kStep, 1, 0, 5, {1, 2, 3}).value(), *before);
}

TEST_F(RowsTest, BadInputIsRefusedByName) {
  Start(TrainingConfig::SYNC, 1);
  EXPECT_THAT(std::string(Pull(TensorClient::Source::kStep, 0, 7, 5, {1}).status().message()),
              HasSubstr("embedding table 7"));
  EXPECT_THAT(std::string(Pull(TensorClient::Source::kStep, 0, 0, 6, {1}).status().message()),
              HasSubstr("embedding table ads: rows of 6 floats; 5 would be right"));

  // Frames as only a faulty client sends them, to shard 0.
  const auto channel = MakeChannel(nodes_[0].rpc->address(), ChannelUse::kBulk);
  const auto outcome = [&](const RowChunk& rows, const std::string& payload) {
    auto stream = BulkStream::Open(channel, "/codistill.TensorTransfer/Push", Soon());
    const auto write = [&](const FrameHeader& header, const std::string& bytes) {
      TensorFrame frame;
      *frame.mutable_header() = header;
      auto owned = std::make_shared<std::string>(bytes);
      const PayloadRef ref = {owned->data(), owned->size(), owned};
      return stream->Write(
          EncodeWithPayload(frame, TensorFrame::kPayloadFieldNumber, absl::MakeConstSpan(&ref, 1)));
    };
    FrameHeader begin;
    *begin.mutable_begin()->mutable_group() = group_;
    begin.mutable_begin()->set_generation(members_[0].generation());
    begin.mutable_begin()->set_step(1);
    begin.mutable_begin()->set_incarnation(members_[0].incarnation());
    begin.mutable_begin()->set_shard_map_digest(members_[0].shard_map_digest());
    write(begin, "");
    FrameHeader header;
    *header.mutable_rows() = rows;
    write(header, payload);
    // A shard that took all that waits for more.
    FrameHeader chunk;
    chunk.mutable_chunk()->set_tensor(99);
    write(chunk, "");
    stream->WritesDone();
    grpc::ByteBuffer message;
    while (stream->Read(&message)) {
    }
    return std::string(stream->Finish().message());
  };
  uint64_t own = 0, other = 0;
  while (ShardOfKey(own, kShards) != 0) ++own;
  while (ShardOfKey(other, kShards) != 1) ++other;
  const auto payload = [](uint64_t key, int floats) {
    std::string bytes(8 + floats * 4, '\0');
    std::memcpy(&bytes[0], &key, 8);
    return bytes;
  };
  RowChunk rows;
  rows.set_table(0);
  rows.set_dim(5);
  rows.set_count(1);
  EXPECT_THAT(outcome(rows, payload(own, 5)), HasSubstr("tensor 99"));  // the rows were good
  EXPECT_THAT(outcome(rows, payload(other, 5)), HasSubstr("belongs to shard 1, not to shard 0"));
  EXPECT_THAT(outcome(rows, payload(own, 4)), HasSubstr("embedding table ads: 1 keys"));
  rows.set_count(std::numeric_limits<int64_t>::max());
  EXPECT_THAT(outcome(rows, payload(own, 5)), HasSubstr("embedding table ads"));
  rows.set_count(-1);
  EXPECT_THAT(outcome(rows, payload(own, 5)), HasSubstr("embedding table ads: -1 keys"));
  rows.set_count(1);
  rows.set_dim(4);
  EXPECT_THAT(outcome(rows, payload(own, 4)), HasSubstr("5 would be right"));
  rows.set_table(2);
  EXPECT_THAT(outcome(rows, payload(own, 4)), HasSubstr("embedding table 2 is none"));
  EXPECT_EQ(nodes_[0].server->shard()->embeddings()->table(0)->stats().rows, 0);
}

}  // namespace
}  // namespace codistill
