#include "cuda/embedding_cuda.h"

#include <string>
#include <vector>

#include "common/base/random.h"
#include "cuda/testing/device_array.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

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

const int64_t kDims[] = {1, 3, 4, 16, 20, 67, 132, 300};

class EmbeddingCudaTest : public DeviceTest {};

TEST_F(EmbeddingCudaTest, GathersAsTheCpu) {
  for (const int64_t dim : kDims) {
    for (const int64_t places : {0, 1, 33, 1000}) {
      for (const int64_t rows : {1, 301}) {
        for (const size_t offset : {0, 1}) {
          const std::vector<float> table = RandomFloats(rows * dim, 1);
          const std::vector<uint32_t> index = RandomIndex(places, rows, 2);
          std::vector<float> want(places * dim);
          ASSERT_TRUE(GatherRowsCpu(table.data(), rows, dim, index, want.data(), 1).ok());
          const DeviceArray<float> device_table(table, offset), to(want.size(), offset);
          const DeviceArray<uint32_t> device_index(index);
          const Workspace workspace(kGatherWorkspaceBytes);
          ASSERT_TRUE(LaunchGatherRows(device_table.get(), rows, dim, device_index.get(), places,
                                       to.get(), workspace.get(), nullptr)
                          .ok());
          ASSERT_TRUE(FinishGatherRows(rows, workspace.get(), nullptr).ok());
          ASSERT_EQ(to.Fetch(), want) << "dim " << dim << " places " << places << " rows " << rows;
          EXPECT_TRUE(to.NothingBehind());
        }
      }
    }
  }
}

TEST_F(EmbeddingCudaTest, GathersVeryMany) {
  // Emulated, as many as its time allows.
#ifdef CODISTILL_EMULATED_CUDA
  const int64_t places = 20000;
#else
  const int64_t places = 5000000;
#endif
  const int64_t rows = 70001, dim = 16;
  const std::vector<float> table = RandomFloats(rows * dim, 1);
  const std::vector<uint32_t> index = RandomIndex(places, rows, 2);
  std::vector<float> want(places * dim);
  ASSERT_TRUE(GatherRowsCpu(table.data(), rows, dim, index, want.data(), 2).ok());
  const DeviceArray<float> device_table(table), to(want.size());
  const DeviceArray<uint32_t> device_index(index);
  const Workspace workspace(kGatherWorkspaceBytes);
  ASSERT_TRUE(LaunchGatherRows(device_table.get(), rows, dim, device_index.get(), places, to.get(),
                               workspace.get(), nullptr)
                  .ok());
  ASSERT_TRUE(FinishGatherRows(rows, workspace.get(), nullptr).ok());
  EXPECT_EQ(to.Fetch(), want);
}

TEST_F(EmbeddingCudaTest, NamesTheFirstIndexThatIsNoRow) {
  const int64_t dim = 8, places = 500;
  const DeviceArray<float> table(std::vector<float>(3 * dim, 1)), to(places * dim);
  std::vector<uint32_t> index(places, 2);
  index[499] = 0xffffffff;
  index[201] = 3;
  const DeviceArray<uint32_t> device_index(index);
  const Workspace workspace(kGatherWorkspaceBytes);
  InEveryOrder([&] {
    ASSERT_TRUE(LaunchGatherRows(table.get(), 3, dim, device_index.get(), places, to.get(),
                                 workspace.get(), nullptr)
                    .ok());
    EXPECT_EQ(FinishGatherRows(3, workspace.get(), nullptr).message(),
              "gather: index holds at place 201 what is no row; want less than 3");
  });
}

// Segments in device memory.
struct DeviceSegments {
  explicit DeviceSegments(const Segments& segments)
      : offsets(segments.offsets),
        positions(segments.positions),
        pieces(segments.pieces),
        long_segments(segments.long_segments),
        view(segments.View()) {
    view.offsets = offsets.get();
    view.positions = positions.get();
    view.pieces = pieces.get();
    view.long_segments = long_segments.get();
  }

  DeviceArray<uint32_t> offsets, positions;
  DeviceArray<SegmentPiece> pieces;
  DeviceArray<LongSegment> long_segments;
  SegmentsView view;
};

TEST_F(EmbeddingCudaTest, SumsSegmentsAsTheCpu) {
  for (const int64_t dim : kDims) {
    for (const int64_t places : {0, 1, 130, 1500}) {
      for (const int64_t rows : {1, 7, 301}) {
        for (const bool accumulate : {false, true}) {
          const size_t offset = places % 4;
          std::vector<float> gradients = RandomFloats(places * dim, 4);
          for (size_t i = 0; i < gradients.size(); i += 5) gradients[i] = -0.0f;
          Segments segments;
          ASSERT_TRUE(FindSegments(RandomIndex(places, rows, 3), rows, &segments).ok());
          const std::vector<float> before = RandomFloats(rows * dim, 5);
          std::vector<float> want = before;
          ASSERT_TRUE(SumSegmentsCpu(segments.View(), gradients.data(), places, dim, accumulate,
                                     want.data(), 1)
                          .ok());
          const DeviceSegments device(segments);
          const DeviceArray<float> device_gradients(gradients, offset), to(before, offset);
          const Workspace workspace(SegmentSumWorkspaceBytes(device.view, dim));
          ASSERT_TRUE(LaunchSegmentSum(device.view, device_gradients.get(), places, dim, accumulate,
                                       to.get(), workspace.get(), nullptr)
                          .ok());
          ASSERT_TRUE(FinishSegmentSum(device.view, places, workspace.get(), nullptr).ok());
          ASSERT_EQ(to.Fetch(), want) << "dim " << dim << " places " << places << " rows " << rows;
          EXPECT_TRUE(to.NothingBehind());
        }
      }
    }
  }
}

TEST_F(EmbeddingCudaTest, NeedsNoPieces) {
  const int64_t dim = 12, places = 1000, rows = 2;
  Segments segments;
  ASSERT_TRUE(FindSegments(RandomIndex(places, rows, 3), rows, &segments).ok());
  const std::vector<float> gradients = RandomFloats(places * dim, 4);
  std::vector<float> want(rows * dim);
  ASSERT_TRUE(
      SumSegmentsCpu(segments.View(), gradients.data(), places, dim, false, want.data(), 1).ok());
  ASSERT_GT(segments.pieces.size(), 0u);
  segments.pieces.clear();
  segments.long_segments.clear();
  const DeviceSegments device(segments);
  const DeviceArray<float> device_gradients(gradients), to(rows * dim);
  const Workspace workspace(SegmentSumWorkspaceBytes(device.view, dim));
  InEveryOrder([&] {
    ASSERT_TRUE(LaunchSegmentSum(device.view, device_gradients.get(), places, dim, false, to.get(),
                                 workspace.get(), nullptr)
                    .ok());
    ASSERT_TRUE(FinishSegmentSum(device.view, places, workspace.get(), nullptr).ok());
    EXPECT_EQ(to.Fetch(), want);
  });
}

TEST_F(EmbeddingCudaTest, NamesWhatIsWrongWithTheSegments) {
  const int64_t dim = 4, places = 400, rows = 3;
  Segments good;
  ASSERT_TRUE(FindSegments(std::vector<uint32_t>(places, 1), rows, &good).ok());
  const DeviceArray<float> gradients(RandomFloats(places * dim, 4)), to(rows * dim);
  auto message = [&](const Segments& segments, int64_t gradient_rows = 400) {
    const DeviceSegments device(segments);
    const Workspace workspace(SegmentSumWorkspaceBytes(device.view, dim));
    const absl::Status launched = LaunchSegmentSum(device.view, gradients.get(), gradient_rows, dim,
                                                   false, to.get(), workspace.get(), nullptr);
    if (!launched.ok()) return std::string(launched.message());
    return std::string(
        FinishSegmentSum(device.view, gradient_rows, workspace.get(), nullptr).message());
  };
  InEveryOrder([&] {
    EXPECT_EQ(message(good), "");
    EXPECT_EQ(message(good, 300),
              "segment sum: positions holds at 300 what is no row; want less than the 300 rows of "
              "gradients");
    Segments bad = good;
    bad.offsets = {0, 5, 2, 400};
    EXPECT_THAT(message(bad), HasSubstr("offsets of segment 1 "));
    bad = good;
    bad.pieces[2].end = 401;
    EXPECT_THAT(message(bad), HasSubstr("pieces: number 2 "));
    bad = good;
    bad.long_segments[0].pieces = 5;
    EXPECT_THAT(message(bad), HasSubstr("long_segments: number 0 "));
    bad = good;
    bad.long_segments.clear();
    EXPECT_THAT(message(bad), HasSubstr("long_segments is null, or their number, 0"));
  });
}

TEST(EmbeddingCudaValidationTest, NamesTheArgumentAtFault) {
  // Refused before anything touches a device.
  float x = 0;
  uint32_t index = 0;
  alignas(16) char workspace[32];
  auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message(LaunchGatherRows(&x, 1, 0, &index, 1, &x, workspace, nullptr)),
              HasSubstr("dim is 0"));
  EXPECT_THAT(message(LaunchGatherRows(&x, 1, 1, nullptr, 1, &x, workspace, nullptr)),
              HasSubstr("index is null"));
  EXPECT_THAT(message(LaunchGatherRows(&x, 1, 1, &index, 1, &x, nullptr, nullptr)),
              HasSubstr("workspace is null"));
  EXPECT_THAT(message(LaunchGatherRows(&x, 1, 1, &index, 1, &x, workspace + 4, nullptr)),
              HasSubstr("workspace is not aligned"));
  SegmentsView segments;
  segments.segments = 1;
  EXPECT_THAT(message(LaunchSegmentSum(segments, &x, 1, 1, false, &x, workspace, nullptr)),
              HasSubstr("offsets is null"));
  EXPECT_THAT(message(FinishGatherRows(1, nullptr, nullptr)), HasSubstr("workspace is null"));
}

}  // namespace
}  // namespace codistill
