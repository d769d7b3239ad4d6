#include "cuda/embedding.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/base/random.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<float> RandomFloats(int64_t n, uint64_t seed) {
  RandomStream random(seed);
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(random.Normal());
  return values;
}

// Every other place has row 0, as the commonest word has.
std::vector<uint32_t> RandomIndex(int64_t n, int64_t rows, uint64_t seed) {
  RandomStream random(seed);
  std::vector<uint32_t> index(n);
  for (uint32_t& i : index) {
    i = random.Below(2) == 0 ? 0 : static_cast<uint32_t>(random.Below(rows));
  }
  return index;
}

const int64_t kDims[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 64, 67, 128, 300};

TEST(GatherRowsTest, TakesTheRowsNamed) {
  for (const int64_t dim : kDims) {
    for (const int64_t places : {0, 1, 2, 17, 1000}) {
      for (const int64_t rows : {1, 3, 501}) {
        // Off the vectors' boundaries.
        std::vector<float> table = RandomFloats(rows * dim + 1, 1);
        const std::vector<uint32_t> index = RandomIndex(places, rows, 2);
        std::vector<float> to(places * dim + 1, -7);
        ASSERT_TRUE(GatherRowsCpu(table.data() + 1, rows, dim, index, to.data(), 2).ok());
        for (int64_t i = 0; i < places; ++i) {
          for (int64_t d = 0; d < dim; ++d) {
            ASSERT_EQ(to[i * dim + d], table[1 + index[i] * dim + d])
                << dim << " " << i << " " << d;
          }
        }
        EXPECT_EQ(to.back(), -7);
      }
    }
  }
}

TEST(GatherRowsTest, NamesTheFirstIndexThatIsNoRow) {
  const int64_t n = 100000, dim = 16;
  const std::vector<float> table(3 * dim);
  std::vector<uint32_t> index(n, 2);
  std::vector<float> to(n * dim);
  index[99999] = 3;
  index[70000] = 0xffffffff;
  index[30001] = 4;
  for (const int threads : {1, 2, 7}) {
    const absl::Status status = GatherRowsCpu(table.data(), 3, dim, index, to.data(), threads);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), "gather: index holds 4 at place 30001; want less than 3");
  }
}

TEST(GatherRowsTest, NamesTheArgumentAtFault) {
  float x = 0;
  const uint32_t index = 0;
  const absl::Span<const uint32_t> one(&index, 1);
  auto message = [](const absl::Status& status) { return std::string(status.message()); };
  EXPECT_THAT(message(GatherRowsCpu(nullptr, 1, 1, one, &x, 1)), HasSubstr("table is null"));
  EXPECT_THAT(message(GatherRowsCpu(&x, -1, 1, one, &x, 1)), HasSubstr("rows is -1"));
  EXPECT_THAT(message(GatherRowsCpu(&x, 1, 0, one, &x, 1)), HasSubstr("dim is 0"));
  EXPECT_THAT(message(GatherRowsCpu(&x, 1, 1, one, nullptr, 1)), HasSubstr("to is null"));
  EXPECT_THAT(message(GatherRowsCpu(nullptr, 0, 1, one, &x, 1)), HasSubstr("at place 0"));
  EXPECT_TRUE(GatherRowsCpu(nullptr, 0, 1, {}, nullptr, 1).ok());
}

TEST(FindSegmentsTest, ListsThePlacesOfEveryRow) {
  Segments segments;
  ASSERT_TRUE(FindSegments({2, 0, 2, 4, 2, 0}, 6, &segments).ok());
  EXPECT_THAT(segments.offsets, ElementsAre(0, 2, 2, 5, 5, 6, 6));
  EXPECT_THAT(segments.positions, ElementsAre(1, 5, 0, 2, 4, 3));
  EXPECT_TRUE(segments.pieces.empty());
  ASSERT_TRUE(FindSegments({}, 2, &segments).ok());
  EXPECT_THAT(segments.offsets, ElementsAre(0, 0, 0));
  EXPECT_TRUE(segments.positions.empty());
  ASSERT_TRUE(FindSegments({}, 0, &segments).ok());
  EXPECT_THAT(segments.offsets, ElementsAre(0));
  EXPECT_EQ(segments.View().segments, 0);
}

TEST(FindSegmentsTest, CutsLongSegmentsIntoPieces) {
  std::vector<uint32_t> index(kSegmentPiece, 0);
  index.insert(index.end(), kSegmentPiece + 1, 1);
  index.insert(index.end(), 3 * kSegmentPiece, 3);
  Segments segments;
  ASSERT_TRUE(FindSegments(index, 4, &segments).ok());
  ASSERT_EQ(segments.long_segments.size(), 2u);
  EXPECT_EQ(segments.long_segments[0].segment, 1u);
  EXPECT_EQ(segments.long_segments[0].first_piece, 0u);
  EXPECT_EQ(segments.long_segments[0].pieces, 2u);
  EXPECT_EQ(segments.long_segments[1].segment, 3u);
  EXPECT_EQ(segments.long_segments[1].first_piece, 2u);
  EXPECT_EQ(segments.long_segments[1].pieces, 3u);
  ASSERT_EQ(segments.pieces.size(), 5u);
  EXPECT_EQ(segments.pieces[0].begin, kSegmentPiece);
  EXPECT_EQ(segments.pieces[1].begin, 2 * kSegmentPiece);
  EXPECT_EQ(segments.pieces[1].end, 2 * kSegmentPiece + 1);
  EXPECT_EQ(segments.pieces[4].end, 5 * kSegmentPiece + 1);
}

TEST(FindSegmentsTest, NamesTheFirstIndexThatIsNoRow) {
  Segments segments;
  EXPECT_EQ(FindSegments({0, 1, 2, 1}, 1, &segments).message(),
            "segments: index holds 1 at place 1; want less than 1");
}

// In double, in the order of the places.
std::vector<double> Reference(const std::vector<uint32_t>& index, int64_t rows, int64_t dim,
                              const std::vector<float>& gradients, std::vector<double>* magnitude) {
  std::vector<double> sums(rows * dim);
  magnitude->assign(rows * dim, 0);
  for (size_t i = 0; i < index.size(); ++i) {
    for (int64_t d = 0; d < dim; ++d) {
      sums[index[i] * dim + d] += gradients[i * dim + d];
      (*magnitude)[index[i] * dim + d] += std::abs(gradients[i * dim + d]);
    }
  }
  return sums;
}

TEST(SumSegmentsTest, AgreesWithTheSumInDouble) {
  for (const int64_t dim : kDims) {
    for (const int64_t places : {0, 1, 2, 129, 3000}) {
      for (const int64_t rows : {1, 3, 501}) {
        const std::vector<uint32_t> index = RandomIndex(places, rows, 3);
        const std::vector<float> gradients = RandomFloats(places * dim, 4);
        std::vector<double> magnitude;
        const std::vector<double> want = Reference(index, rows, dim, gradients, &magnitude);
        Segments segments;
        ASSERT_TRUE(FindSegments(index, rows, &segments).ok());
        std::vector<float> one(rows * dim + 1, -7), many = one, twice = one;
        ASSERT_TRUE(
            SumSegmentsCpu(segments.View(), gradients.data(), places, dim, false, one.data(), 1)
                .ok());
        for (int64_t i = 0; i < rows * dim; ++i) {
          ASSERT_NEAR(one[i], want[i], 1e-12 + 4e-6 * magnitude[i]) << dim << " " << i;
        }
        EXPECT_EQ(one.back(), -7);
        for (const int threads : {2, 5}) {
          ASSERT_TRUE(SumSegmentsCpu(segments.View(), gradients.data(), places, dim, false,
                                     many.data(), threads)
                          .ok());
          EXPECT_EQ(one, many) << "dim " << dim << " threads " << threads;
        }
        std::copy(one.begin(), one.end(), twice.begin());
        ASSERT_TRUE(
            SumSegmentsCpu(segments.View(), gradients.data(), places, dim, true, twice.data(), 2)
                .ok());
        for (int64_t i = 0; i < rows * dim; ++i) ASSERT_EQ(twice[i], one[i] + one[i]);
      }
    }
  }
}

TEST(SumSegmentsTest, SumsInTheOrderDocumented) {
  // Sums that differ in the last bit when they are associated in another way.
  const int64_t n = 5 * kSegmentPiece + 3;
  const std::vector<float> gradients = RandomFloats(n, 5);
  float want = 0;
  for (int64_t begin = 0; begin < n; begin += kSegmentPiece) {
    float piece = gradients[begin];
    for (int64_t i = begin + 1; i < std::min(begin + kSegmentPiece, n); ++i) piece += gradients[i];
    want = begin == 0 ? piece : want + piece;
  }
  Segments segments;
  ASSERT_TRUE(FindSegments(std::vector<uint32_t>(n, 0), 1, &segments).ok());
  float sum = 0;
  ASSERT_TRUE(SumSegmentsCpu(segments.View(), gradients.data(), n, 1, false, &sum, 1).ok());
  EXPECT_EQ(sum, want);
}

TEST(SumSegmentsTest, SharesOutWorkThatIsMostlyOneSegments) {
  // 300,000 places, most of them of the first of 50 rows.
  const int64_t n = 300000, rows = 50, dim = 8;
  std::vector<uint32_t> index(n, 0);
  for (int64_t i = 0; i < n; i += 100) index[i] = static_cast<uint32_t>(i / 100 % rows);
  const std::vector<float> gradients = RandomFloats(n * dim, 6);
  Segments segments;
  ASSERT_TRUE(FindSegments(index, rows, &segments).ok());
  std::vector<float> one(rows * dim), many(rows * dim, -7);
  ASSERT_TRUE(SumSegmentsCpu(segments.View(), gradients.data(), n, dim, false, one.data(), 1).ok());
  ASSERT_TRUE(
      SumSegmentsCpu(segments.View(), gradients.data(), n, dim, false, many.data(), 6).ok());
  EXPECT_EQ(one, many);
}

TEST(SumSegmentsTest, NamesTheArgumentAtFault) {
  const std::vector<float> gradients(4);
  std::vector<float> to(4);
  auto message = [&](const Segments& segments, int64_t gradient_rows) {
    return std::string(
        SumSegmentsCpu(segments.View(), gradients.data(), gradient_rows, 2, false, to.data(), 2)
            .message());
  };
  Segments segments;
  ASSERT_TRUE(FindSegments({1, 0, 0}, 2, &segments).ok());
  EXPECT_EQ(message(segments, 2),
            "segment sum: positions holds 2 at 1; want less than the 2 rows of gradients");
  segments.offsets = {0, 3, 2};
  EXPECT_THAT(message(segments, 3), HasSubstr("offsets of segment 1 are 3 to 2"));
  segments.offsets = {0, 4, 4};
  EXPECT_THAT(message(segments, 3), HasSubstr("offsets of segment 0 are 0 to 4"));
  EXPECT_THAT(message(segments, -1), HasSubstr("gradient_rows is -1"));
  EXPECT_THAT(
      std::string(SumSegmentsCpu(segments.View(), nullptr, 2, 2, false, to.data(), 1).message()),
      HasSubstr("gradients is null"));
  EXPECT_THAT(
      std::string(
          SumSegmentsCpu(segments.View(), gradients.data(), 2, 0, false, to.data(), 1).message()),
      HasSubstr("dim is 0"));
  EXPECT_THAT(
      std::string(
          SumSegmentsCpu(segments.View(), gradients.data(), 2, 2, false, nullptr, 1).message()),
      HasSubstr("to is null"));
}

}  // namespace
}  // namespace codistill
