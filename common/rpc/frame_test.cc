#include "common/rpc/frame.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "proto/open_inference.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {
namespace {

constexpr int kField = TensorFrame::kPayloadFieldNumber;

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) bytes.append(slice.begin(), slice.end());
  return bytes;
}

// `bytes` in slices that end at random places, empty ones among them.
grpc::ByteBuffer Shatter(const std::string& bytes, std::mt19937* random, size_t max_slice) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t size = std::min(bytes.size() - begin,
                                 std::uniform_int_distribution<size_t>(0, max_slice)(*random));
    slices.emplace_back(bytes.data() + begin, size);
    begin += size;
  }
  slices.emplace_back("", 0);
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string RandomBytes(size_t size, std::mt19937* random) {
  std::string bytes(size, '\0');
  for (char& c : bytes) c = static_cast<char>((*random)());
  return bytes;
}

TensorFrame Header() {
  TensorFrame frame;
  TensorChunk* chunk = frame.mutable_header()->mutable_chunk();
  chunk->set_tensor(300);
  chunk->set_begin(int64_t{1} << 40);
  chunk->set_count(-1);
  chunk->set_dtype(DT_FLOAT);
  return frame;
}

PayloadRef RefTo(std::shared_ptr<const std::string> bytes) {
  return {bytes->data(), bytes->size(), bytes};
}

TEST(FrameTest, WhatWeEncodeIsProtobuf) {
  for (size_t size : {size_t{0}, size_t{1}, size_t{511}, size_t{512}, size_t{1} << 20}) {
    std::mt19937 random(size);
    auto bytes = std::make_shared<const std::string>(RandomBytes(size, &random));
    TensorFrame expected = Header();
    expected.set_payload(*bytes);
    TensorFrame parsed;
    ASSERT_TRUE(
        parsed.ParseFromString(Flatten(EncodeWithPayload(Header(), kField, {RefTo(bytes)}))));
    EXPECT_EQ(parsed.SerializeAsString(), expected.SerializeAsString()) << size;
  }
}

TEST(FrameTest, LargePayloadsAreNotCopiedAndStayAliveUntilReleased) {
  auto bytes = std::make_shared<const std::string>(100000, 'x');
  {
    grpc::ByteBuffer buffer = EncodeWithPayload(Header(), kField, {RefTo(bytes)});
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(buffer.Dump(&slices).ok());
    ASSERT_EQ(slices.size(), 2u);
    EXPECT_EQ(reinterpret_cast<const char*>(slices[1].begin()), bytes->data());
    EXPECT_EQ(bytes.use_count(), 2);
  }
  EXPECT_EQ(bytes.use_count(), 1);
}

TEST(FrameTest, NoPayloadAndNoFields) {
  grpc::ByteBuffer empty = EncodeWithPayload(TensorFrame(), kField, {});
  EXPECT_EQ(empty.Length(), 0u);
  TensorFrame small = Header();
  DecodedPayload payload;
  ASSERT_TRUE(DecodedPayload::Decode(&empty, kField, &small, &payload).ok());
  EXPECT_FALSE(small.has_header());
  EXPECT_EQ(payload.count(), 0);
}

TEST(FrameTest, DecodesWhateverTheSlices) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    TensorFrame message = Header();
    message.set_payload(RandomBytes(random() % 5000, &random));
    grpc::ByteBuffer buffer =
        Shatter(message.SerializeAsString(), &random, 1 + random() % (round % 2 ? 8 : 3000));
    TensorFrame small;
    DecodedPayload payload, moved;
    ASSERT_TRUE(DecodedPayload::Decode(&buffer, kField, &small, &payload).ok());
    moved = std::move(payload);
    buffer.Clear();
    ASSERT_EQ(moved.count(), message.payload().empty() ? 0 : 1);
    EXPECT_EQ(small.SerializeAsString(), Header().SerializeAsString());
    if (moved.count() == 0) continue;
    ASSERT_EQ(moved.size(0), message.payload().size());
    std::string copy(moved.size(0), '\0');
    moved.CopyTo(0, copy.data());
    EXPECT_EQ(copy, message.payload());
  }
}

TEST(FrameTest, SeveralPayloadsAndFieldsAfterThem) {
  inference::ModelInferRequest request;
  request.set_model_name("north");
  request.add_inputs()->set_name("x");
  std::mt19937 random(2);
  std::vector<PayloadRef> payloads;
  for (size_t size : {size_t{2000}, size_t{0}, size_t{3}, size_t{70000}}) {
    payloads.push_back(RefTo(std::make_shared<const std::string>(RandomBytes(size, &random))));
  }
  constexpr int kRaw = inference::ModelInferRequest::kRawInputContentsFieldNumber;
  std::string bytes = Flatten(EncodeWithPayload(request, kRaw, payloads));
  // Fields may come in any order: more of the message behind the payloads.
  inference::ModelInferRequest more;
  more.set_id("17");
  bytes += more.SerializeAsString();
  grpc::ByteBuffer buffer = Shatter(bytes, &random, 5000);
  inference::ModelInferRequest small;
  DecodedPayload payload;
  ASSERT_TRUE(DecodedPayload::Decode(&buffer, kRaw, &small, &payload).ok());
  EXPECT_EQ(small.model_name(), "north");
  EXPECT_EQ(small.inputs(0).name(), "x");
  EXPECT_EQ(small.id(), "17");
  EXPECT_EQ(small.raw_input_contents_size(), 0);
  ASSERT_EQ(payload.count(), 4);
  for (int i = 0; i < payload.count(); ++i) {
    std::string copy(payload.size(i), '\0');
    payload.CopyTo(i, copy.data());
    EXPECT_EQ(copy, std::string(static_cast<const char*>(payloads[i].data), payloads[i].size)) << i;
  }
}

// Every truncation is either refused or is itself a complete message, exactly as protobuf sees it.
TEST(FrameTest, TruncationsAreRefused) {
  TensorFrame message = Header();
  std::mt19937 random(3);
  message.set_payload(RandomBytes(700, &random));
  const std::string bytes = message.SerializeAsString();
  for (size_t size = 0; size < bytes.size(); ++size) {
    grpc::ByteBuffer buffer = Shatter(bytes.substr(0, size), &random, 50);
    TensorFrame small, reference;
    DecodedPayload payload;
    const absl::Status status = DecodedPayload::Decode(&buffer, kField, &small, &payload);
    EXPECT_EQ(status.ok(), reference.ParseFromString(bytes.substr(0, size))) << size;
    if (!status.ok()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_EQ(payload.count(), 0);
    }
  }
}

// Flipped bytes: never a crash, and nothing accepted that protobuf would not accept.
TEST(FrameTest, DamagedMessagesAgreeWithProtobuf) {
  std::mt19937 random(4);
  TensorFrame message = Header();
  message.set_payload(RandomBytes(40, &random));
  const std::string good = message.SerializeAsString();
  int refused = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = good;
    for (int flips = 1 + random() % 3; flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    grpc::ByteBuffer buffer = Shatter(bytes, &random, 20);
    TensorFrame small, reference;
    DecodedPayload payload;
    const absl::Status status = DecodedPayload::Decode(&buffer, kField, &small, &payload);
    if (!status.ok()) {
      ++refused;
      continue;
    }
    ASSERT_TRUE(reference.ParseFromString(bytes)) << round;
    std::string last;
    if (payload.count() > 0) {
      last.resize(payload.size(payload.count() - 1));
      payload.CopyTo(payload.count() - 1, last.data());
    }
    EXPECT_EQ(last, reference.payload());
  }
  EXPECT_GT(refused, 1000);
}

TEST(FrameTest, LengthsBeyondTheEndAndInvalidBuffersAreRefused) {
  TensorFrame small;
  DecodedPayload payload;
  grpc::ByteBuffer invalid;
  EXPECT_FALSE(DecodedPayload::Decode(&invalid, kField, &small, &payload).ok());
  // Payload of 2^64 - 1 bytes.
  const std::string bytes = "\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01 and then little";
  grpc::Slice slice(bytes);
  grpc::ByteBuffer buffer(&slice, 1);
  const absl::Status status = DecodedPayload::Decode(&buffer, kField, &small, &payload);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("field 15 is cut short"), std::string::npos) << status;
}

}  // namespace
}  // namespace codistill
