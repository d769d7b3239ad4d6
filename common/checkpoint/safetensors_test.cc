#include "common/checkpoint/safetensors.h"

#include <cstring>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

std::string Bytes(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
  return bytes + header + data;
}

std::string Floats(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

absl::StatusOr<std::unique_ptr<SafetensorsReader>> OpenBytes(const std::string& bytes) {
  const std::string path = JoinPath(testing::TempDir(), "weights.safetensors");
  const absl::Status status = WriteFileAtomically(path, bytes);
  if (!status.ok()) return status;
  return SafetensorsReader::Open(path);
}

constexpr char kHeader[] =
    R"({"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("n":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}   )";

TEST(SafetensorsTest, ReadsPieces) {
  const auto reader = OpenBytes(Bytes(kHeader, Floats({0, 1, 2, 3, 4, 5, 6, 7})));
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->entries().size(), 2u);
  const SafetensorsReader::Entry* w = (*reader)->Find("w");
  ASSERT_NE(w, nullptr);
  EXPECT_EQ(w->dtype, DT_FLOAT);
  EXPECT_EQ(w->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ((*reader)->Find("n")->dtype, DT_INT64);
  EXPECT_EQ((*reader)->Find("other"), nullptr);
  std::vector<float> values(2);
  ASSERT_TRUE((*reader)->Read("w", 12, 8, values.data()).ok());
  EXPECT_EQ(values, (std::vector<float>{3, 4}));
  EXPECT_EQ((*reader)->Read("w", 20, 8, values.data()).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ((*reader)->Read("x", 0, 0, nullptr).code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsTest, RefusesWhatIsWrong) {
  struct Case {
    std::string bytes;
    const char* says;
  };
  const std::string data = Floats({0, 1, 2, 3, 4, 5, 6, 7});
  const auto one = [](const std::string& entry) { return "{\"w\":" + entry + "}"; };
  const Case cases[] = {
      {"", "0 bytes"},
      {"PK\3\4 a zip file, no doubt", "first 8 bytes"},
      {Bytes("[]", ""), "no JSON object"},
      {Bytes("{\"w\":", ""), "no JSON object"},
      {Bytes(kHeader, data.substr(0, 31)), "cut short"},
      {Bytes(kHeader, data + "x"), "after the last tensor"},
      {Bytes(one("7"), data), "tensor w its header entry"},
      {Bytes(one(R"({"shape":[8],"data_offsets":[0,32]})"), data), "has no dtype"},
      {Bytes(one(R"({"dtype":"F31","shape":[8],"data_offsets":[0,32]})"), data), "F31"},
      {Bytes(one(R"({"dtype":"F32","shape":[-8],"data_offsets":[0,32]})"), data), "shape"},
      {Bytes(one(R"({"dtype":"F32","shape":[8.5],"data_offsets":[0,32]})"), data), "shape"},
      {Bytes(one(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,32]})"), data),
       "too large"},
      {Bytes(one(R"({"dtype":"F32","shape":[8],"data_offsets":[8,0]})"), data), "bytes 8 to 0"},
      {Bytes(one(R"({"dtype":"F32","shape":[8],"data_offsets":["a",0]})"), data), "data_offsets"},
      {Bytes(one(R"({"dtype":"F32","shape":[7],"data_offsets":[0,32]})"), data), "7 elements"},
  };
  for (const Case& c : cases) {
    const auto reader = OpenBytes(c.bytes);
    ASSERT_EQ(reader.status().code(), absl::StatusCode::kDataLoss) << c.says << reader.status();
    EXPECT_THAT(std::string(reader.status().message()), HasSubstr(c.says));
    EXPECT_THAT(std::string(reader.status().message()), HasSubstr("weights.safetensors"));
  }
  EXPECT_EQ(SafetensorsReader::Open("/nonexistent/w.safetensors").status().code(),
            absl::StatusCode::kNotFound);
}

TEST(SafetensorsTest, WhatIsWrittenIsRead) {
  const std::string path = JoinPath(testing::TempDir(), "written.safetensors");
  const auto fill = [](const std::string& bytes) {
    return [bytes](char* to) {
      std::memcpy(to, bytes.data(), bytes.size());
      return absl::OkStatus();
    };
  };
  const std::string w = Floats({1, 2, 3, 4, 5, 6});
  std::vector<SafetensorsItem> items = {
      {"w\"quoted", DT_FLOAT, {2, 3}, fill(w)},
      {"n", DT_INT64, {}, fill(std::string(8, '\1'))},
      {"empty", DT_FLOAT, {0, 4}, fill("")},
  };
  ASSERT_TRUE(WriteSafetensors(path, items, {{"format", "pt"}}).ok());
  const auto reader = SafetensorsReader::Open(path);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ((*reader)->entries().size(), 3u);
  std::string read(w.size(), '\0');
  ASSERT_TRUE((*reader)->Read("w\"quoted", 0, read.size(), read.data()).ok());
  EXPECT_EQ(read, w);

  items.push_back(items[0]);
  const absl::Status twice = WriteSafetensors(path, items, {});
  EXPECT_EQ(twice.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(twice.ToString(), HasSubstr("quoted is there twice"));
  // What was there is still there.
  EXPECT_TRUE(SafetensorsReader::Open(path).ok());

  items = {{"w", DT_FLOAT, {1}, [](char*) { return absl::DataLossError("damaged"); }}};
  const absl::Status damaged = WriteSafetensors(JoinPath(testing::TempDir(), "none"), items, {});
  EXPECT_EQ(damaged.code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(FileSystem::Real()->Exists(JoinPath(testing::TempDir(), "none")));
}

}  // namespace
}  // namespace codistill
