#include "common/config/shard_map.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

void Add(const std::string& name, std::vector<int64_t> shape, TensorList* list,
         TensorSpec::Role role = TensorSpec::PARAMETER, DataType dtype = DT_FLOAT) {
  TensorSpec* spec = list->add_tensors();
  spec->set_name(name);
  for (const int64_t dimension : shape) spec->add_shape(dimension);
  spec->set_dtype(dtype);
  spec->set_role(role);
}

// Shapes of ResNet-50: 25.6 million parameters in 161 tensors, with batch-norm buffers.
TensorList ResNet50() {
  TensorList list;
  const auto convolution = [&list](const std::string& name, int64_t out, int64_t in, int64_t size) {
    Add(name + ".weight", {out, in, size, size}, &list);
    Add(name + ".norm.weight", {out}, &list);
    Add(name + ".norm.bias", {out}, &list);
    Add(name + ".norm.running_mean", {out}, &list, TensorSpec::BUFFER);
    Add(name + ".norm.running_var", {out}, &list, TensorSpec::BUFFER);
    Add(name + ".norm.num_batches_tracked", {}, &list, TensorSpec::BUFFER, DT_INT64);
  };
  convolution("conv1", 64, 3, 7);
  const int blocks[] = {3, 4, 6, 3};
  int64_t in = 64;
  for (int stage = 0; stage < 4; ++stage) {
    const int64_t width = int64_t{64} << stage;
    for (int block = 0; block < blocks[stage]; ++block) {
      const std::string name = absl::StrCat("layer", stage + 1, ".", block);
      convolution(name + ".conv1", width, in, 1);
      convolution(name + ".conv2", width, width, 3);
      convolution(name + ".conv3", 4 * width, width, 1);
      if (block == 0) convolution(name + ".downsample", 4 * width, in, 1);
      in = 4 * width;
    }
  }
  Add("fc.weight", {1000, 2048}, &list);
  Add("fc.bias", {1000}, &list);
  return list;
}

int64_t Elements(const TensorSpec& spec) {
  return std::accumulate(spec.shape().begin(), spec.shape().end(), int64_t{1},
                         std::multiplies<int64_t>());
}

// A click model with the tables of Criteo's 26 categorical features, dense, of 16 columns each,
// from 3 to 10 million rows, and a small network on top.
TensorList EmbeddingHeavy() {
  TensorList list;
  const int64_t rows[] = {1460,  583,  10000000, 2202608, 305, 24,     12517,   633,   3,
                          93145, 5683, 8351593,  3194,    27,  14992,  5461306, 10,    5652,
                          2173,  4,    7046547,  18,      15,  286181, 105,     142572};
  for (size_t i = 0; i < std::size(rows); ++i) {
    Add(absl::StrCat("tables.", i, ".weight"), {rows[i], 16}, &list);
  }
  const int64_t widths[] = {429, 400, 400, 400, 1};
  for (size_t i = 0; i + 1 < std::size(widths); ++i) {
    Add(absl::StrCat("layers.", i, ".weight"), {widths[i + 1], widths[i]}, &list);
    Add(absl::StrCat("layers.", i, ".bias"), {widths[i + 1]}, &list);
  }
  return list;
}

class Placement : public testing::TestWithParam<std::pair<const char*, TensorList (*)()>> {};

TEST_P(Placement, LoadsNoShardMuchMoreThanTheMean) {
  const TensorList list = GetParam().second();
  for (const int shards : {2, 3, 4, 5, 8, 16}) {
    const auto map = BuildShardMap(list, shards);
    ASSERT_TRUE(map.ok()) << map.status();
    const std::vector<uint64_t> bytes = BytesOfShards(*map);
    ASSERT_EQ(bytes.size(), static_cast<size_t>(shards));
    uint64_t total = 0;
    for (const TensorSpec& spec : list.tensors()) {
      total += Elements(spec) * (spec.dtype() == DT_INT64 ? 8 : 4);
    }
    EXPECT_EQ(std::accumulate(bytes.begin(), bytes.end(), uint64_t{0}), total);
    EXPECT_GT(total, uint64_t{100000000});
    EXPECT_LE(static_cast<double>(*std::max_element(bytes.begin(), bytes.end())),
              1.1 * static_cast<double>(total) / shards)
        << shards << " shards";
    // Deterministic: whoever builds it has the same map.
    EXPECT_EQ(ShardMapDigest(*map), ShardMapDigest(BuildShardMap(list, shards).value()));
  }
}

INSTANTIATE_TEST_SUITE_P(Lists, Placement,
                         testing::Values(std::make_pair("ResNet50", &ResNet50),
                                         std::make_pair("EmbeddingHeavy", &EmbeddingHeavy)),
                         [](const auto& info) { return std::string(info.param.first); });

TEST(BuildShardMap, CoversEveryElementOnceInOrder) {
  TensorList list = ResNet50();
  Add("odd", {16384 + 5}, &list);
  Add("empty", {0, 3}, &list);
  for (const int shards : {1, 3, 8, 2000}) {
    const auto map = BuildShardMap(list, shards);
    ASSERT_TRUE(map.ok()) << map.status();
    EXPECT_EQ(map->num_shards(), shards);
    int p = 0;
    for (int t = 0; t < list.tensors_size(); ++t) {
      int64_t next = 0;
      int pieces = 0;
      while (p < map->pieces_size() && map->pieces(p).tensor() == static_cast<uint32_t>(t)) {
        const Piece& piece = map->pieces(p++);
        EXPECT_EQ(piece.begin(), next);
        EXPECT_EQ(piece.begin() % 16, 0);
        EXPECT_GT(piece.count(), 0);
        EXPECT_GE(piece.shard(), 0);
        EXPECT_LT(piece.shard(), shards);
        next += piece.count();
        ++pieces;
      }
      const TensorSpec& spec = list.tensors(t);
      EXPECT_EQ(next, Elements(spec)) << spec.name();
      if (spec.role() == TensorSpec::BUFFER || next < kSplitElements) {
        EXPECT_LE(pieces, 1);
      } else if (shards <= 8) {
        EXPECT_EQ(pieces, shards) << spec.name();
      }
    }
    EXPECT_EQ(p, map->pieces_size());
  }
}

TEST(BuildShardMap, PlacesSmallTensorsBySizeThenNameThenShard) {
  TensorList list;
  Add("c", {10}, &list);
  Add("b", {10}, &list);
  Add("a", {30}, &list);
  Add("large_buffer", {100000}, &list, TensorSpec::BUFFER);
  const auto map = BuildShardMap(list, 3);
  ASSERT_TRUE(map.ok()) << map.status();
  std::vector<int> shard_of(4);
  ASSERT_EQ(map->pieces_size(), 4);
  for (const Piece& piece : map->pieces()) shard_of[piece.tensor()] = piece.shard();
  // The buffer first, on shard 0, whole; then a on 1, b on 2, c again on 2 (40 bytes against 120).
  EXPECT_EQ(shard_of, (std::vector<int>{2, 2, 1, 0}));
}

TEST(BuildShardMap, TiedTensorsHaveNoPieces) {
  TensorList list;
  Add("weight", {4}, &list);
  Add("also", {4}, &list, TensorSpec::TIED);
  list.mutable_tensors(1)->set_tied_to("weight");
  Add("constant", {20000}, &list, TensorSpec::FROZEN);
  const auto map = BuildShardMap(list, 2);
  ASSERT_TRUE(map.ok()) << map.status();
  std::vector<uint32_t> tensors;
  for (const Piece& piece : map->pieces()) tensors.push_back(piece.tensor());
  EXPECT_EQ(tensors, (std::vector<uint32_t>{0, 2, 2}));
}

TEST(BuildShardMap, IsTheSameEveryTime) {
  const auto a = BuildShardMap(ResNet50(), 5);
  const auto b = BuildShardMap(ResNet50(), 5);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->SerializeAsString(), b->SerializeAsString());
  EXPECT_EQ(ShardMapDigest(*a), ShardMapDigest(*b));
}

TEST(BuildShardMap, NamesTheTensorAtFault) {
  struct Case {
    TensorSpec spec;
    const char* error;
  };
  const auto spec = [](const char* name, int64_t dimension, DataType dtype, TensorSpec::Role role,
                       const char* tied_to = "") {
    TensorSpec result;
    result.set_name(name);
    result.add_shape(dimension);
    result.set_dtype(dtype);
    result.set_role(role);
    result.set_tied_to(tied_to);
    return result;
  };
  for (const Case& c : {
           Case{spec("good", 1, DT_FLOAT, TensorSpec::PARAMETER), "name used twice"},
           Case{spec("", 1, DT_FLOAT, TensorSpec::PARAMETER), "no name"},
           Case{spec("bad", -1, DT_FLOAT, TensorSpec::PARAMETER), "impossible shape ([-1])"},
           Case{spec("bad", 1, DT_INVALID, TensorSpec::BUFFER), "unknown dtype"},
           Case{spec("bad", 1, DT_DOUBLE, TensorSpec::PARAMETER), "wrong dtype of a PARAMETER"},
           Case{spec("bad", 1, DT_FLOAT, TensorSpec::ROLE_INVALID), "no role"},
           Case{spec("bad", 1, DT_FLOAT, TensorSpec::TIED, "gone"), "does not exist (gone)"},
       }) {
    TensorList list;
    Add("good", {1}, &list);
    *list.add_tensors() = c.spec;
    const absl::Status status = BuildShardMap(list, 2).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.error));
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.spec.name()));
  }
  EXPECT_EQ(BuildShardMap(TensorList(), 0).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ShardMapDigest, DependsOnEverythingInTheMap) {
  TensorList list;
  Add("a", {64, 512}, &list);
  Add("b", {3}, &list);
  const ShardMap map = *BuildShardMap(list, 2);
  std::set<uint64_t> digests = {ShardMapDigest(map)};
  std::vector<ShardMap> changed(10, map);
  changed[0].set_num_shards(3);
  changed[1].set_format_version(2);
  changed[2].mutable_tensors(0)->set_name("c");
  changed[3].mutable_tensors(0)->set_shape(0, 512);
  changed[4].mutable_tensors(1)->set_role(TensorSpec::BUFFER);
  changed[5].mutable_tensors(1)->set_dtype(DT_INT32);
  changed[6].mutable_pieces(0)->set_shard(1);
  changed[7].mutable_pieces(0)->set_count(16);
  changed[8].mutable_pieces()->RemoveLast();
  changed[9].mutable_tensors(1)->add_shape(1);
  for (const ShardMap& other : changed) {
    EXPECT_NE(ShardMapDigest(other), 0u);
    digests.insert(ShardMapDigest(other));
  }
  EXPECT_EQ(digests.size(), changed.size() + 1);
}

TEST(FirstDifference, SaysWhatDiffers) {
  TensorList a;
  Add("fc.weight", {2, 3}, &a);
  TensorList b = a;
  EXPECT_EQ(FirstDifference(a, b), "");
  Add("fc.bias", {2}, &b);
  EXPECT_EQ(FirstDifference(a, b),
            "1 tensors here and 2 there; only there: fc.bias FP32 [2] PARAMETER");
  b.mutable_tensors(0)->set_shape(1, 4);
  EXPECT_EQ(FirstDifference(a, b),
            "tensor 0 is fc.weight FP32 [2, 3] PARAMETER here and fc.weight FP32 [2, 4] PARAMETER "
            "there");
}

TEST(LoadTensorList, ReadsAndChecks) {
  const std::string path = JoinPath(std::getenv("TEST_TMPDIR"), "m.tensors.textproto");
  ASSERT_TRUE(WriteFileAtomically(
                  path, "tensors { name: 'w' shape: 2 shape: 3 dtype: DT_FLOAT role: PARAMETER }")
                  .ok());
  const auto list = LoadTensorList(path);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->tensors_size(), 1);
  EXPECT_EQ(list->tensors(0).shape(1), 3);

  for (const auto& [text, error] : std::vector<std::pair<std::string, std::string>>{
           {"tensors {\n name: 'w' rol: PARAMETER }", "2:12: tensors[0].rol"},
           {"", "no tensors"},
           {"tensors { name: 'w' dtype: DT_FLOAT }", "no role"}}) {
    ASSERT_TRUE(WriteFileAtomically(path, text).ok());
    const absl::Status status = LoadTensorList(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(error));
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
  }
  EXPECT_EQ(LoadTensorList(path + ".no").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace codistill
