#include "common/client/shard_layout.h"

#include "common/config/shard_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using testing::HasSubstr;

ShardMap Map() {
  TensorList list;
  auto add = [&](const char* name, int64_t size, TensorSpec::Role role) {
    TensorSpec* spec = list.add_tensors();
    spec->set_name(name);
    spec->add_shape(size);
    spec->set_dtype(DT_FLOAT);
    spec->set_role(role);
    return spec;
  };
  add("big", 100000, TensorSpec::PARAMETER);
  add("small", 10, TensorSpec::PARAMETER);
  add("tied", 100000, TensorSpec::TIED)->set_tied_to("big");
  const auto map = BuildShardMap(list, 3);
  EXPECT_TRUE(map.ok()) << map.status();
  return *map;
}

TEST(ShardLayoutTest, FindsEveryElementOnItsShardOnly) {
  const auto layout = ShardLayout::Create(Map());
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->digest(), ShardMapDigest(Map()));
  EXPECT_EQ(layout->elements(0), 100000);
  EXPECT_EQ(layout->of_tensor(0).size(), 3u);
  EXPECT_TRUE(layout->of_tensor(2).empty());
  for (int64_t element : {0, 1, 33343, 33344, 66666, 99999}) {
    int holders = 0;
    for (int shard = 0; shard < 3; ++shard) {
      const int index = layout->FindPiece(shard, 0, element);
      if (index < 0) continue;
      ++holders;
      const Piece& piece = layout->of_shard(shard)[index];
      EXPECT_EQ(piece.tensor(), 0u);
      EXPECT_LE(piece.begin(), element);
      EXPECT_LT(element, piece.begin() + piece.count());
    }
    EXPECT_EQ(holders, 1) << element;
  }
  for (int shard = 0; shard < 3; ++shard) {
    EXPECT_EQ(layout->FindPiece(shard, 0, 100000), -1);
    EXPECT_EQ(layout->FindPiece(shard, 0, -1), -1);
    EXPECT_EQ(layout->FindPiece(shard, 2, 0), -1);
    EXPECT_EQ(layout->FindPiece(shard, 7, 0), -1);
  }
}

std::string Error(const ShardMap& map) {
  return std::string(ShardLayout::Create(map).status().message());
}

TEST(ShardLayoutTest, RefusesAMapThatDoesNotHold) {
  ShardMap map = Map();
  map.mutable_pieces(1)->set_begin(map.pieces(1).begin() + 16);
  EXPECT_THAT(Error(map), HasSubstr("of tensor big must begin at"));
  map = Map();
  map.mutable_pieces(2)->set_count(map.pieces(2).count() + 1);
  EXPECT_THAT(Error(map), HasSubstr("end within 100000"));
  map = Map();
  map.mutable_pieces(2)->set_count(map.pieces(2).count() - 1);
  EXPECT_THAT(Error(map), HasSubstr("cover 99999 of 100000"));
  map = Map();
  map.mutable_pieces(0)->set_shard(3);
  EXPECT_THAT(Error(map), HasSubstr("on shard 3"));
  map = Map();
  map.mutable_pieces(0)->set_tensor(9);
  EXPECT_THAT(Error(map), HasSubstr("piece of tensor 9"));
  map = Map();
  map.mutable_tensors(1)->set_role(TensorSpec::TIED);
  EXPECT_THAT(Error(map), HasSubstr("tied tensor small has a piece"));
  map = Map();
  map.set_num_shards(0);
  EXPECT_THAT(Error(map), HasSubstr("num_shards 0"));
}

}  // namespace
}  // namespace codistill
