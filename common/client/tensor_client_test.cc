#include "common/client/tensor_client.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "common/client/fake_shards.h"
#include "common/config/shard_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

constexpr int kShards = 3;
constexpr int kBig = 0, kSmall = 1, kTied = 2, kCount = 3;

TensorList List() {
  TensorList list;
  auto add = [&](const char* name, std::vector<int64_t> shape, DataType dtype,
                 TensorSpec::Role role) {
    TensorSpec* spec = list.add_tensors();
    spec->set_name(name);
    for (int64_t size : shape) spec->add_shape(size);
    spec->set_dtype(dtype);
    spec->set_role(role);
    return spec;
  };
  add("big", {1000, 1000}, DT_FLOAT, TensorSpec::PARAMETER);
  add("small", {7}, DT_FLOAT, TensorSpec::PARAMETER);
  add("tied", {1000, 1000}, DT_FLOAT, TensorSpec::TIED)->set_tied_to("big");
  add("count", {}, DT_INT64, TensorSpec::BUFFER);
  return list;
}

std::string Bytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::vector<float> Ramp(size_t n, float first) {
  std::vector<float> values(n);
  for (size_t i = 0; i < n; ++i) values[i] = first + static_cast<float>(i % 4093) * 0.5f;
  return values;
}

// Everything is tested through gRPC (false) and through shared memory (true).
class TensorClientTest : public testing::TestWithParam<bool> {
 protected:
  TensorClientTest() : map_(*BuildShardMap(List(), kShards)), shards_(map_, GetParam()) {
    big_ = Ramp(1000000, 1);
    small_ = Ramp(7, -3);
    const int64_t count = 42;
    shards_.Put(2, 10,
                {Bytes(big_), Bytes(small_), "",
                 std::string(reinterpret_cast<const char*>(&count), sizeof(count))});
    auto client = TensorClient::Create({Ref(), map_, shards_.addresses()});
    EXPECT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
    big_view_.resize(big_.size());
    small_view_.resize(small_.size());
  }

  void TearDown() override {
    const TensorClient::StreamCounts counts = client_->stream_counts();
    if (!GetParam()) {
      EXPECT_EQ(counts.shared_memory, 0);
    } else if (!some_shard_is_away_) {
      EXPECT_EQ(counts.grpc, 0);
    }
  }

  static GroupRef Ref() {
    GroupRef ref;
    ref.set_run_id("run");
    ref.set_group("alpha");
    return ref;
  }

  std::vector<TensorView> Views() {
    return {{"big", DT_FLOAT, {1000, 1000}, big_view_.data()},
            {"small", DT_FLOAT, {7}, small_view_.data()},
            {},
            {"count", DT_INT64, {}, &count_view_}};
  }

  absl::StatusOr<TensorClient::PullResult> Pull(
      uint64_t generation = 2, int64_t step = 10,
      TensorClient::Source source = TensorClient::Source::kCut) {
    return client_->Pull(source, generation, step, Views(), Soon());
  }

  std::string PullError() {
    const auto result = Pull();
    EXPECT_TRUE(absl::IsDataLoss(result.status())) << result.status();
    return std::string(result.status().message());
  }

  static absl::Time Soon() { return absl::Now() + absl::Seconds(30); }

  std::unique_ptr<PushStream> StartPush(absl::Time deadline = Soon()) {
    TensorClient::PushHeader header;
    header.generation = 2;
    header.step = 11;
    header.rank = 1;
    header.incarnation = 5;
    header.weights_step = 10;
    return client_->StartPush(header, deadline);
  }

  bool some_shard_is_away_ = false;
  const ShardMap map_;
  FakeShards shards_;
  std::unique_ptr<TensorClient> client_;
  std::vector<float> big_, small_, big_view_, small_view_;
  int64_t count_view_ = 0;
};

TEST_P(TensorClientTest, PullsEveryTensorFromAllShards) {
  for (const auto source : {TensorClient::Source::kCut, TensorClient::Source::kStep,
                            TensorClient::Source::kAtLeastStep}) {
    std::fill(big_view_.begin(), big_view_.end(), -1.0f);
    std::fill(small_view_.begin(), small_view_.end(), -1.0f);
    count_view_ = 0;
    const auto result = Pull(2, 10, source);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->version.generation(), 2u);
    EXPECT_EQ(result->version.step(), 10);
    EXPECT_GT(result->bytes, 4000000u + 28 + 8);
    EXPECT_LT(result->bytes, 4100000u);
    EXPECT_TRUE(big_view_ == big_);
    EXPECT_TRUE(small_view_ == small_);
    EXPECT_EQ(count_view_, 42);
  }
}

TEST_P(TensorClientTest, PullKeepsTheCodeAndNamesTheShard) {
  const auto result = Pull(2, 11);
  EXPECT_TRUE(absl::IsAborted(result.status())) << result.status();
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("no cut 2.11"));
  bool named = false;
  for (int i = 0; i < kShards; ++i) {
    named |= absl::StrContains(result.status().message(),
                               "shard " + std::to_string(i) + " (" + shards_.addresses()[i] + ")");
  }
  EXPECT_TRUE(named) << result.status();
  EXPECT_TRUE(Pull().ok());
}

TEST_P(TensorClientTest, PullTellsTheRealErrorNotTheCancellationsItCaused) {
  shards_.set_pull_filter([](int shard, int, TensorFrame* frame) {
    if (shard == 1 && frame->header().has_pull_end()) {
      frame->mutable_header()->mutable_pull_end()->set_bytes(1);
    }
    return true;
  });
  EXPECT_THAT(PullError(), testing::StartsWith("shard 1 ("));
}

TEST_P(TensorClientTest, PullRefusesAStreamThatIsNotTheShardsPieces) {
  auto change_chunk = [&](std::function<void(TensorChunk*, TensorFrame*)> change) {
    shards_.set_pull_filter([change](int shard, int index, TensorFrame* frame) {
      if (shard == 0 && index == 2) change(frame->mutable_header()->mutable_chunk(), frame);
      return true;
    });
    return PullError();
  };
  EXPECT_THAT(change_chunk([](TensorChunk* c, TensorFrame*) { c->set_begin(c->begin() + 1); }),
              HasSubstr("of tensor big; it must begin at"));
  EXPECT_THAT(change_chunk([](TensorChunk* c, TensorFrame*) { c->set_count(c->count() + 1); }),
              HasSubstr("tensor big is FP32 with"));
  EXPECT_THAT(change_chunk([](TensorChunk* c, TensorFrame*) { c->set_count(1 << 30); }),
              HasSubstr("end within"));
  EXPECT_THAT(change_chunk([](TensorChunk* c, TensorFrame*) { c->set_tensor(77); }),
              HasSubstr("which this shard does not hold"));
  EXPECT_THAT(change_chunk([](TensorChunk* c, TensorFrame*) { c->set_dtype(DT_HALF); }),
              HasSubstr("tensor big is FP16"));
  EXPECT_THAT(
      change_chunk([](TensorChunk* c, TensorFrame*) { c->set_content(TensorChunk::GRADIENT); }),
      HasSubstr("it must be the values"));
  EXPECT_THAT(change_chunk([](TensorChunk*, TensorFrame* f) { f->mutable_payload()->pop_back(); }),
              HasSubstr("tensor big is FP32 with"));

  auto leave_out = [&](std::function<bool(const FrameHeader&, int)> which) {
    shards_.set_pull_filter([which](int shard, int index, TensorFrame* frame) {
      return shard != 0 || !which(frame->header(), index);
    });
    return PullError();
  };
  EXPECT_THAT(leave_out([](const FrameHeader& h, int) { return h.has_pull_begin(); }),
              HasSubstr("no PullBegin"));
  EXPECT_THAT(leave_out([](const FrameHeader& h, int) { return h.has_pull_end(); }),
              HasSubstr("without a PullEnd"));
  EXPECT_THAT(leave_out([](const FrameHeader&, int i) { return i == 2; }),
              HasSubstr("it must begin at"));
  EXPECT_THAT(leave_out([](const FrameHeader& h, int i) { return h.has_chunk() && i > 3; }),
              HasSubstr("elements of tensor"));
  shards_.set_pull_filter(nullptr);
  EXPECT_TRUE(Pull().ok());
}

TEST_P(TensorClientTest, PullRefusesAnotherVersionThanAskedFor) {
  shards_.set_pull_filter([](int, int, TensorFrame* frame) {
    if (frame->header().has_pull_begin()) {
      frame->mutable_header()->mutable_pull_begin()->mutable_version()->set_step(9);
    }
    return true;
  });
  EXPECT_THAT(PullError(), HasSubstr("answered with step 9, asked for 10"));
  shards_.set_pull_filter([](int, int, TensorFrame* frame) {
    if (frame->header().has_pull_begin()) {
      frame->mutable_header()->mutable_pull_begin()->mutable_version()->set_generation(3);
    }
    return true;
  });
  EXPECT_TRUE(absl::IsAborted(Pull().status()));
}

TEST_P(TensorClientTest, PullChecksTheViews) {
  std::vector<TensorView> views = Views();
  views[kSmall].shape = {6};
  auto result = client_->Pull(TensorClient::Source::kCut, 2, 10, views, Soon());
  EXPECT_TRUE(absl::IsFailedPrecondition(result.status()));
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("tensor small"));
  views = Views();
  views[kCount].dtype = DT_FLOAT;
  EXPECT_TRUE(absl::IsFailedPrecondition(
      client_->Pull(TensorClient::Source::kCut, 2, 10, views, Soon()).status()));
  views = Views();
  views.pop_back();
  EXPECT_TRUE(absl::IsFailedPrecondition(
      client_->Pull(TensorClient::Source::kCut, 2, 10, views, Soon()).status()));
  EXPECT_EQ(shards_.pulls(), 0);
}

TEST_P(TensorClientTest, PullEndsAtItsDeadlineAndWhenCancelled) {
  shards_.set_hang(true);
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      client_
          ->Pull(TensorClient::Source::kCut, 2, 10, Views(), absl::Now() + absl::Milliseconds(200))
          .status()));
  const int before = shards_.pulls();
  absl::Status status;
  std::thread pull([&] { status = Pull().status(); });
  while (shards_.pulls() < before + kShards) absl::SleepFor(absl::Milliseconds(1));
  client_->CancelPull();
  pull.join();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
}

TEST_P(TensorClientTest, AddressesMustMatchTheMap) {
  EXPECT_TRUE(absl::IsInvalidArgument(TensorClient::Create({Ref(), map_, {"a:1"}}).status()));
}

// Puts the chunks of all shards together; every element exactly once.
std::vector<float> Gather(const FakeShards& shards, int tensor, size_t elements) {
  std::vector<float> values(elements, std::numeric_limits<float>::quiet_NaN());
  size_t total = 0;
  for (int shard = 0; shard < kShards; ++shard) {
    const auto pushes = shards.pushes(shard);
    if (pushes.size() != 1) {
      ADD_FAILURE() << pushes.size() << " pushes on shard " << shard;
      continue;
    }
    const auto found = pushes[0].gradients.find(tensor);
    if (found == pushes[0].gradients.end()) continue;
    for (const auto& [begin, bytes] : found->second) {
      std::memcpy(values.data() + begin, bytes.data(), bytes.size());
      total += bytes.size() / sizeof(float);
    }
  }
  EXPECT_EQ(total, elements);
  return values;
}

TEST_P(TensorClientTest, PushesGradientsBuffersAndState) {
  auto push = StartPush();
  const auto big = std::make_shared<std::vector<float>>(Ramp(1000000, 0.25f));
  const auto small = std::make_shared<std::vector<float>>(Ramp(7, 5));
  push->AddGradient(kBig, big->data(), big);
  push->AddGradient(kSmall, small->data(), small);
  const auto count = std::make_shared<int64_t>(43);
  push->AddBuffer(kCount, count.get(), count);
  const std::string state(3 << 20, 's');
  push->AddWorkerState(state);
  PushEnd end;
  end.set_num_examples(64);
  end.set_label_loss_sum(1.5);
  const auto result = push->Finish(end);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, APPLIED);
  EXPECT_EQ(result->step, 11);

  EXPECT_TRUE(Gather(shards_, kBig, 1000000) == *big);
  EXPECT_TRUE(Gather(shards_, kSmall, 7) == *small);
  double squared_norm = 0, want = 0;
  uint64_t bytes = 0;
  int counts = 0;
  for (int shard = 0; shard < kShards; ++shard) {
    const FakeShards::Push received = shards_.pushes(shard)[0];
    EXPECT_EQ(received.begin.group().group(), "alpha");
    EXPECT_EQ(received.begin.generation(), 2u);
    EXPECT_EQ(received.begin.step(), 11);
    EXPECT_EQ(received.begin.rank(), 1);
    EXPECT_EQ(received.begin.incarnation(), 5u);
    EXPECT_EQ(received.begin.weights_step(), 10);
    EXPECT_EQ(received.begin.shard_map_digest(), ShardMapDigest(map_));
    EXPECT_EQ(received.end.num_examples(), 64);
    EXPECT_EQ(received.end.label_loss_sum(), 1.5);
    EXPECT_TRUE(received.end.finite());
    EXPECT_LE(received.largest_payload, 1 << 20);
    EXPECT_EQ(received.worker_state, shard == 0 ? state : "");
    squared_norm += received.end.squared_norm();
    bytes += received.bytes;
    const auto value = received.values.find(kCount);
    if (value != received.values.end()) {
      ++counts;
      EXPECT_EQ(std::memcmp(value->second.at(0).data(), count.get(), 8), 0);
    }
  }
  EXPECT_EQ(counts, 1);
  EXPECT_EQ(result->bytes, bytes);
  for (float x : *big) want += static_cast<double>(x) * x;
  for (float x : *small) want += static_cast<double>(x) * x;
  EXPECT_NEAR(squared_norm / want, 1, 1e-12);
}

TEST_P(TensorClientTest, PushSaysWhichTensorIsNotFinite) {
  auto push = StartPush();
  const auto big = std::make_shared<std::vector<float>>(Ramp(1000000, 0.25f));
  const auto small = std::make_shared<std::vector<float>>(Ramp(7, 5));
  (*small)[3] = std::numeric_limits<float>::infinity();
  push->AddGradient(kBig, big->data(), big);
  push->AddGradient(kSmall, small->data(), small);
  ASSERT_TRUE(push->Finish(PushEnd()).ok());
  // Its values went to one shard; all are told.
  for (int shard = 0; shard < kShards; ++shard) {
    const PushEnd end = shards_.pushes(shard)[0].end;
    EXPECT_FALSE(end.finite()) << shard;
    EXPECT_EQ(end.not_finite_tensor(), "small") << shard;
  }
}

TEST_P(TensorClientTest, PushTellsTheDecision) {
  shards_.set_on_push_frame([](int, const TensorFrame& frame, const FakeShards::Push&) {
    if (!frame.header().has_end()) return std::unique_ptr<FakeShards::Answer>();
    auto answer = std::make_unique<FakeShards::Answer>();
    answer->reply.set_outcome(REJECTED);
    answer->reply.set_step(11);
    answer->reply.set_message("tensor small is not finite");
    return answer;
  });
  auto push = StartPush();
  push->AddGradient(kSmall, small_.data(), nullptr);
  const auto result = push->Finish(PushEnd());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, REJECTED);
  EXPECT_EQ(result->message, "tensor small is not finite");
}

TEST_P(TensorClientTest, PushTakesAnAnswerThatComesBeforeItsEnd) {
  shards_.set_on_push_frame([](int, const TensorFrame&, const FakeShards::Push&) {
    auto answer = std::make_unique<FakeShards::Answer>();
    answer->reply.set_outcome(DROPPED_LATE);
    answer->reply.set_step(11);
    return answer;
  });
  auto push = StartPush();
  for (int i = 0; i < 20; ++i) push->AddGradient(kBig, big_.data(), nullptr);  // 80 MB
  const auto result = push->Finish(PushEnd());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->outcome, DROPPED_LATE);
}

TEST_P(TensorClientTest, PushFailsWithTheFirstShardsErrorAndCancelsTheOthers) {
  // Only shard 2 answers; the others would wait for ever.
  shards_.set_on_push_frame([](int shard, const TensorFrame& frame, const FakeShards::Push&) {
    if (shard != 2 || !frame.header().has_end()) return std::unique_ptr<FakeShards::Answer>();
    auto answer = std::make_unique<FakeShards::Answer>();
    answer->status = absl::AbortedError("generation 3 has begun");
    return answer;
  });
  auto push = StartPush();
  push->AddGradient(kBig, big_.data(), nullptr);
  const auto result = push->Finish(PushEnd());
  EXPECT_TRUE(absl::IsAborted(result.status())) << result.status();
  EXPECT_EQ(result.status().message(),
            "shard 2 (" + shards_.addresses()[2] + "): generation 3 has begun");
  while (shards_.cancelled_pushes() < 2) absl::SleepFor(absl::Milliseconds(1));
}

TEST_P(TensorClientTest, PushToADeadShardFails) {
  auto addresses = shards_.addresses();
  addresses[1] = "127.0.0.1:1";
  some_shard_is_away_ = true;
  client_ = *TensorClient::Create({Ref(), map_, addresses});
  auto push = StartPush();
  push->AddGradient(kBig, big_.data(), nullptr);
  const auto result = push->Finish(PushEnd());
  EXPECT_TRUE(absl::IsUnavailable(result.status())) << result.status();
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("shard 1 (127.0.0.1:1)"));
}

TEST_P(TensorClientTest, UnansweredPushEndsAtItsDeadline) {
  shards_.set_on_push_frame([](int, const TensorFrame&, const FakeShards::Push&) {
    return std::unique_ptr<FakeShards::Answer>();
  });
  auto push = StartPush(absl::Now() + absl::Milliseconds(300));
  push->AddGradient(kSmall, small_.data(), nullptr);
  EXPECT_TRUE(absl::IsDeadlineExceeded(push->Finish(PushEnd()).status()));
}

TEST_P(TensorClientTest, UnansweredPushEndsWhenCancelled) {
  shards_.set_on_push_frame([](int, const TensorFrame&, const FakeShards::Push&) {
    return std::unique_ptr<FakeShards::Answer>();
  });
  auto push = StartPush();
  push->AddGradient(kSmall, small_.data(), nullptr);
  absl::Status status;
  std::thread finish([&] { status = push->Finish(PushEnd()).status(); });
  push->Cancel();
  finish.join();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
}

TEST_P(TensorClientTest, AbandonedPushIsCancelledAndLetsGoOfItsMemory) {
  const auto gradient = std::make_shared<std::vector<float>>(Ramp(1000000, 1));
  {
    auto push = StartPush();
    push->AddGradient(kBig, gradient->data(), gradient);
  }
  while (shards_.cancelled_pushes() < kShards) absl::SleepFor(absl::Milliseconds(1));
  const absl::Time deadline = Soon();
  while (gradient.use_count() > 1 && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_EQ(gradient.use_count(), 1);
  for (int shard = 0; shard < kShards; ++shard) EXPECT_TRUE(shards_.pushes(shard).empty());
}

TEST_P(TensorClientTest, ThePathIsChosenByItselfAndCanBeRefused) {
  ASSERT_TRUE(Pull().ok());
  EXPECT_EQ(GetParam() ? client_->stream_counts().shared_memory : client_->stream_counts().grpc,
            kShards);
  TensorClient::Options options{Ref(), map_, shards_.addresses()};
  options.shared_memory = false;
  const auto refusing = *TensorClient::Create(options);
  ASSERT_TRUE(refusing->Pull(TensorClient::Source::kCut, 2, 10, Views(), Soon()).ok());
  EXPECT_EQ(refusing->stream_counts().shared_memory, 0);
  EXPECT_EQ(refusing->stream_counts().grpc, kShards);
}

INSTANTIATE_TEST_SUITE_P(Paths, TensorClientTest, testing::Bool(),
                         [](const testing::TestParamInfo<bool>& info) {
                           return info.param ? "SharedMemory" : "Grpc";
                         });

}  // namespace
}  // namespace codistill
