#include "server/staged_push.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor/float16.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/test_model.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

TEST(ArrivedRangesTest, JoinsNeighboursAndRefusesOverlaps) {
  ArrivedRanges ranges;
  EXPECT_EQ(ranges.FirstMissing(10), 0);
  EXPECT_TRUE(ranges.Add(0, 3));
  EXPECT_EQ(ranges.FirstMissing(10), 3);
  EXPECT_TRUE(ranges.Add(5, 7));
  EXPECT_FALSE(ranges.Add(6, 8));
  EXPECT_FALSE(ranges.Add(2, 4));
  EXPECT_FALSE(ranges.Add(4, 6));
  EXPECT_FALSE(ranges.Add(0, 10));
  EXPECT_FALSE(ranges.Add(5, 7));
  EXPECT_EQ(ranges.FirstMissing(10), 3);
  EXPECT_TRUE(ranges.Add(7, 10));
  EXPECT_TRUE(ranges.Add(3, 5));
  EXPECT_EQ(ranges.FirstMissing(10), 10);
  EXPECT_TRUE(ranges.Add(4, 4));  // nothing
}

class StagedPushTest : public testing::Test {
 protected:
  void SetUp() override {
    auto map = BuildShardMap(TestTensors(), 1);
    ASSERT_TRUE(map.ok()) << map.status();
    auto layout = PieceLayout::Create(*map, 0);
    ASSERT_TRUE(layout.ok()) << layout.status();
    layout_ = std::make_unique<PieceLayout>(*std::move(layout));
    PushBegin begin;
    begin.set_rank(3);
    begin.set_step(7);
    push_ = std::make_unique<StagedPush>(layout_.get(), begin,
                                         std::make_shared<AlignedBuffer>(layout_->buffer_bytes()));
  }

  static TensorChunk Chunk(uint32_t tensor, int64_t begin, int64_t count,
                           TensorChunk::Content content, DataType dtype = DT_FLOAT) {
    TensorChunk chunk;
    chunk.set_tensor(tensor);
    chunk.set_begin(begin);
    chunk.set_count(count);
    chunk.set_content(content);
    chunk.set_dtype(dtype);
    return chunk;
  }

  void ExpectRefused(const TensorChunk& chunk, size_t bytes, const std::string& says) {
    const auto place = push_->Place(chunk, bytes);
    EXPECT_EQ(place.status().code(), absl::StatusCode::kInvalidArgument) << says;
    EXPECT_THAT(std::string(place.status().message()), HasSubstr(says));
  }

  std::unique_ptr<PieceLayout> layout_;
  std::unique_ptr<StagedPush> push_;
};

constexpr auto kGradient = TensorChunk::GRADIENT;
constexpr auto kValue = TensorChunk::VALUE;

TEST_F(StagedPushTest, ChunksInAnyOrderMakeItComplete) {
  ASSERT_TRUE(push_->Place(Chunk(1, 0, 128, kGradient), 512).ok());
  ASSERT_TRUE(push_->Place(Chunk(0, 1000, 19480, kGradient), 4 * 19480).ok());
  ASSERT_TRUE(push_->Place(Chunk(4, 0, 128, kValue), 512).ok());
  ASSERT_TRUE(push_->Place(Chunk(5, 0, 1, kValue, DT_INT64), 8).ok());
  EXPECT_THAT(std::string(push_->CheckComplete().message()), HasSubstr("tensor w "));
  EXPECT_EQ(push_->CheckComplete().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(push_->Place(Chunk(0, 0, 1000, kGradient), 4000).ok());
  EXPECT_TRUE(push_->CheckComplete().ok()) << push_->CheckComplete();
}

TEST_F(StagedPushTest, RefusesWhatDoesNotFitAndNamesIt) {
  ExpectRefused(Chunk(99, 0, 1, kGradient), 4, "tensor 99 is not in the shard map");
  ExpectRefused(Chunk(0, 20480, 1, kGradient), 4, "tensor w: 1 elements from 20480");
  ExpectRefused(Chunk(0, -1, 1, kGradient), 4, "tensor w");
  ExpectRefused(Chunk(0, 0, -1, kGradient), 4, "tensor w");
  ExpectRefused(Chunk(0, INT64_MAX, INT64_MAX, kGradient), 4, "tensor w");
  ExpectRefused(Chunk(0, 0, 4, kGradient), 15, "4 elements came with 15 bytes");
  ExpectRefused(Chunk(0, 0, 4, kGradient, DT_DOUBLE), 32, "has dtype DT_FLOAT, not DT_DOUBLE");
  ExpectRefused(Chunk(0, 0, 4, kValue), 16, "takes no VALUE");
  ExpectRefused(Chunk(4, 0, 4, kGradient), 16, "tensor mean: is a BUFFER and takes no GRADIENT");
  ExpectRefused(Chunk(3, 0, 3, kValue), 12, "tensor fixed: is FROZEN");
  ExpectRefused(Chunk(2, 0, 3, kGradient), 12, "tensor w2");
  ASSERT_TRUE(push_->Place(Chunk(1, 0, 100, kGradient), 400).ok());
  ExpectRefused(Chunk(1, 99, 2, kGradient), 8, "tensor b: elements [99, 101) overlap");
}

// Halves become floats, staged or taken at once.
TEST_F(StagedPushTest, TakesGradientsInHalfPrecision) {
  struct Sink final : PushSink {
    void Take(int, int64_t first, int64_t count, CopyOut copy, ViewOut view) override {
      EXPECT_EQ(first, 28);
      got.resize(count);
      EXPECT_TRUE(view(0, 4).empty());
      // In two parts.
      copy(0, 12, got.data());
      copy(12, 4 * count - 12, got.data() + 3);
    }
    std::vector<float> got;
  };
  std::vector<float> gradient;
  for (int i = 0; i < 100; ++i) gradient.push_back(static_cast<float>(i) - 0.25f);
  std::vector<uint16_t> halves(gradient.size());
  ToFloat16(gradient.data(), gradient.size(), halves.data());
  const auto copy = [&](size_t begin, size_t size, void* to) {
    std::memcpy(to, reinterpret_cast<const uint8_t*>(halves.data()) + begin, size);
  };
  const auto view = [](size_t, size_t) { return absl::Span<const uint8_t>(); };
  const TensorChunk chunk = Chunk(1, 28, 100, kGradient, DT_HALF);
  ASSERT_TRUE(push_->Take(chunk, 200, copy, view).ok());
  const ShardPiece& piece = layout_->pieces()[layout_->Find(1, 28, 100).value()];
  const auto* const staged = reinterpret_cast<const float*>(push_->data() + piece.offset) + 28;
  EXPECT_EQ(std::vector<float>(staged, staged + 100), gradient);
  EXPECT_FALSE(push_->Take(chunk, 200, copy, view).ok());  // twice

  auto sink = std::make_unique<Sink>();
  const Sink& taken = *sink;
  StagedPush early(layout_.get(), PushBegin(), std::move(sink));
  ASSERT_TRUE(early.Take(chunk, 200, copy, view).ok());
  EXPECT_EQ(taken.got, gradient);

  ExpectRefused(Chunk(0, 0, 4, kGradient, DT_HALF), 16, "4 elements came with 16 bytes; 8 were");
  ExpectRefused(Chunk(4, 0, 4, kValue, DT_HALF), 8, "tensor mean: has dtype DT_FLOAT, not DT_HALF");
}

TEST_F(StagedPushTest, WorkerStateComesInOrder) {
  TensorChunk chunk = Chunk(0, 0, 3, TensorChunk::WORKER_STATE);
  auto place = push_->Place(chunk, 3);
  ASSERT_TRUE(place.ok());
  std::memcpy(*place, "abc", 3);
  ExpectRefused(chunk, 3, "in order");
  chunk.set_begin(3);
  ExpectRefused(chunk, 2, "in order");
  place = push_->Place(chunk, 3);
  ASSERT_TRUE(place.ok());
  std::memcpy(*place, "def", 3);
  EXPECT_EQ(push_->worker_state(), "abcdef");
}

TEST_F(StagedPushTest, SupersededTakesNoMore) {
  push_->Supersede();
  EXPECT_EQ(push_->Place(Chunk(1, 0, 1, kGradient), 4).status().code(), absl::StatusCode::kAborted);
}

}  // namespace
}  // namespace codistill
