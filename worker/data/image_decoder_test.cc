#include "worker/data/image_decoder.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ImageDecoder, DecodesJpegAndPng) {
  ImageDecoder decoder;
  Image image;
  ASSERT_TRUE(decoder.Decode(Jpeg(5, 3, 200, 100, 50), &image).ok());
  EXPECT_EQ(image.width, 5);
  EXPECT_EQ(image.height, 3);
  ASSERT_EQ(image.pixels.size(), 45u);
  for (int i = 0; i < 15; ++i) {
    EXPECT_NEAR(image.pixels[3 * i], 200, 3);
    EXPECT_NEAR(image.pixels[3 * i + 1], 100, 3);
    EXPECT_NEAR(image.pixels[3 * i + 2], 50, 3);
  }
  ASSERT_TRUE(decoder.Decode(Png(2, 1, "abcdef"), &image).ok());
  EXPECT_EQ(image.width, 2);
  EXPECT_THAT(image.pixels, ElementsAre('a', 'b', 'c', 'd', 'e', 'f'));
}

TEST(ImageDecoder, RefusesDamage) {
  ImageDecoder decoder;
  Image image;
  const std::string jpeg = Jpeg(64, 64, 1, 2, 3);
  absl::Status status = decoder.Decode(jpeg.substr(0, jpeg.size() / 2), &image);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("damaged JPEG"));
  status = decoder.Decode(jpeg.substr(0, 10), &image);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  const std::string png = Png(8, 8, std::string(192, 'x'));
  status = decoder.Decode(png.substr(0, png.size() - 20), &image);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("damaged PNG"));
  EXPECT_EQ(decoder.Decode("GIF89a", &image).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(decoder.Decode("", &image).code(), absl::StatusCode::kInvalidArgument);
  // The decoder goes on working.
  EXPECT_TRUE(decoder.Decode(jpeg, &image).ok());
}

Image Grey(int width, int height, const std::vector<uint8_t>& values) {
  Image image;
  image.width = width;
  image.height = height;
  for (const uint8_t value : values) {
    image.pixels.insert(image.pixels.end(), {value, static_cast<uint8_t>(value / 2), 0});
  }
  return image;
}

// The first plane, in units of 1 / 255.
std::vector<float> Plane(const Image& image, int64_t height, int64_t width,
                         const Augmentation& augmentation) {
  std::vector<float> planes(3 * height * width, -1);
  ToPlanes(image, height, width, augmentation, planes.data());
  std::vector<float> first(planes.begin(), planes.begin() + height * width);
  for (float& value : first) value *= 255;
  return first;
}

TEST(ToPlanes, SeparatesChannels) {
  std::vector<float> planes(6);
  ToPlanes(Grey(2, 1, {255, 102}), 1, 2, Augmentation(), planes.data());
  EXPECT_THAT(planes, ElementsAre(1, testing::FloatEq(0.4f), testing::FloatEq(127 / 255.0f),
                                  testing::FloatEq(0.2f), 0, 0));
}

TEST(ToPlanes, FlipsAndCrops) {
  const Image image = Grey(3, 2, {1, 2, 3, 4, 5, 6});
  Augmentation augmentation;
  augmentation.flip = true;
  EXPECT_THAT(Plane(image, 2, 3, augmentation),
              testing::Pointwise(testing::FloatEq(), {3, 2, 1, 6, 5, 4}));
  augmentation.flip = false;
  augmentation.padding = 1;
  augmentation.crop_x = 1;
  augmentation.crop_y = 1;  // the middle: as it was
  EXPECT_THAT(Plane(image, 2, 3, augmentation),
              testing::Pointwise(testing::FloatEq(), {1, 2, 3, 4, 5, 6}));
  augmentation.crop_x = 2;
  augmentation.crop_y = 0;  // one to the right, one up
  EXPECT_THAT(Plane(image, 2, 3, augmentation),
              testing::Pointwise(testing::FloatEq(), {0, 0, 0, 2, 3, 0}));
  augmentation.flip = true;
  EXPECT_THAT(Plane(image, 2, 3, augmentation),
              testing::Pointwise(testing::FloatEq(), {0, 0, 0, 0, 3, 2}));
}

TEST(ToPlanes, ResizesBilinearly) {
  EXPECT_THAT(Plane(Grey(2, 1, {0, 100}), 1, 4, Augmentation()),
              testing::Pointwise(testing::FloatNear(1e-4f), {0, 25, 75, 100}));
  EXPECT_THAT(Plane(Grey(4, 1, {0, 10, 20, 30}), 1, 2, Augmentation()),
              testing::Pointwise(testing::FloatNear(1e-4f), {5, 25}));
  EXPECT_THAT(Plane(Grey(1, 1, {7}), 2, 2, Augmentation()),
              testing::Pointwise(testing::FloatNear(1e-4f), {7, 7, 7, 7}));
}

}  // namespace
}  // namespace codistill
