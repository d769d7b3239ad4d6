#include "worker/data/image_decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "png.h"
#include "turbojpeg.h"

namespace codistill {
namespace {

constexpr int64_t kMaxPixels = int64_t{1} << 26;
constexpr int kChannels = 3;

// Makes room for width x height pixels.
absl::Status Reserve(int64_t width, int64_t height, Image* image) {
  if (width < 1 || height < 1 || width > kMaxPixels / height) {
    return absl::InvalidArgumentError(absl::StrCat("an image of ", width, " x ", height,
                                                   " pixels; at most ", kMaxPixels,
                                                   " in all would be right"));
  }
  image->width = static_cast<int>(width);
  image->height = static_cast<int>(height);
  image->pixels.resize(static_cast<size_t>(width * height * kChannels));
  return absl::OkStatus();
}

// Pixels of one output row or column: between `low` and `high`, at `fraction` of the way.
struct Sample {
  int low;
  int high;
  float fraction;
};

std::vector<Sample> Samples(int from, int64_t to) {
  std::vector<Sample> samples(to);
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  for (int64_t i = 0; i < to; ++i) {
    const double at = std::clamp((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0, from - 1.0);
    const int low = static_cast<int>(at);
    samples[i] = {low, std::min(low + 1, from - 1), static_cast<float>(at - low)};
  }
  return samples;
}

}  // namespace

ImageDecoder::ImageDecoder() = default;

ImageDecoder::~ImageDecoder() {
  if (jpeg_ != nullptr) tjDestroy(jpeg_);
}

absl::Status ImageDecoder::Decode(absl::string_view bytes, Image* image) {
  if (absl::StartsWith(bytes, "\xff\xd8\xff")) return DecodeJpeg(bytes, image);
  if (absl::StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return DecodePng(bytes, image);
  return absl::InvalidArgumentError(
      absl::StrCat("neither JPEG nor PNG (", bytes.size(), " bytes)"));
}

absl::Status ImageDecoder::DecodeJpeg(absl::string_view bytes, Image* image) {
  if (jpeg_ == nullptr) {
    jpeg_ = tjInitDecompress();
    if (jpeg_ == nullptr) return absl::ResourceExhaustedError("no memory for a JPEG decoder");
  }
  const auto* data = reinterpret_cast<const unsigned char*>(bytes.data());
  int width = 0, height = 0, subsampling = 0, colors = 0;
  // Warnings count as damage (a truncated file is one, the rest of the image grey), but for bytes
  // too many between or after the parts, which are common and lose nothing.
  const auto damaged = [this](int result) {
    return result != 0 && !(tjGetErrorCode(jpeg_) == TJERR_WARNING &&
                            absl::StrContains(tjGetErrorStr2(jpeg_), "extraneous bytes"));
  };
  if (damaged(
          tjDecompressHeader3(jpeg_, data, bytes.size(), &width, &height, &subsampling, &colors))) {
    return absl::DataLossError(absl::StrCat("damaged JPEG: ", tjGetErrorStr2(jpeg_)));
  }
  if (width < 1 || height < 1) return absl::DataLossError("damaged JPEG: it ends in its header");
  if (colors == TJCS_CMYK || colors == TJCS_YCCK) {
    return absl::InvalidArgumentError("a JPEG in CMYK; RGB or grey would be right");
  }
  if (absl::Status status = Reserve(width, height, image); !status.ok()) return status;
  if (damaged(tjDecompress2(jpeg_, data, bytes.size(), image->pixels.data(), width, /*pitch=*/0,
                            height, TJPF_RGB, TJFLAG_ACCURATEDCT))) {
    return absl::DataLossError(absl::StrCat("damaged JPEG: ", tjGetErrorStr2(jpeg_)));
  }
  return absl::OkStatus();
}

absl::Status ImageDecoder::DecodePng(absl::string_view bytes, Image* image) {
  png_image png;
  std::memset(&png, 0, sizeof(png));
  png.version = PNG_IMAGE_VERSION;
  if (png_image_begin_read_from_memory(&png, bytes.data(), bytes.size()) == 0) {
    return absl::DataLossError(absl::StrCat("damaged PNG: ", png.message));
  }
  png.format = PNG_FORMAT_RGB;
  absl::Status status = Reserve(png.width, png.height, image);
  if (status.ok()) {
    const png_color black = {0, 0, 0};
    if (png_image_finish_read(&png, &black, image->pixels.data(), /*row_stride=*/0,
                              /*colormap=*/nullptr) == 0) {
      status = absl::DataLossError(absl::StrCat("damaged PNG: ", png.message));
    }
  }
  png_image_free(&png);
  return status;
}

void ToPlanes(const Image& image, int64_t height, int64_t width, const Augmentation& augmentation,
              float* out) {
  constexpr float kScale = 1.0f / 255;
  const int64_t shift_x = augmentation.crop_x - augmentation.padding;
  const int64_t shift_y = augmentation.crop_y - augmentation.padding;
  const bool resize = image.height != height || image.width != width;
  const std::vector<Sample> xs = resize ? Samples(image.width, width) : std::vector<Sample>();
  const std::vector<Sample> ys = resize ? Samples(image.height, height) : std::vector<Sample>();
  const auto pixel = [&image](int64_t y, int64_t x) {
    return image.pixels.data() + (y * image.width + x) * kChannels;
  };
  const int64_t plane = height * width;
  for (int64_t row = 0; row < height; ++row) {
    const int64_t y = row + shift_y;
    for (int64_t column = 0; column < width; ++column) {
      const int64_t x = (augmentation.flip ? width - 1 - column : column) + shift_x;
      float* to = out + row * width + column;
      if (y < 0 || y >= height || x < 0 || x >= width) {
        for (int c = 0; c < kChannels; ++c) to[c * plane] = 0;
      } else if (!resize) {
        const uint8_t* from = pixel(y, x);
        for (int c = 0; c < kChannels; ++c) to[c * plane] = from[c] * kScale;
      } else {
        const Sample& sy = ys[y];
        const Sample& sx = xs[x];
        const uint8_t* corners[] = {pixel(sy.low, sx.low), pixel(sy.low, sx.high),
                                    pixel(sy.high, sx.low), pixel(sy.high, sx.high)};
        for (int c = 0; c < kChannels; ++c) {
          const float top = corners[0][c] + (corners[1][c] - corners[0][c]) * sx.fraction;
          const float bottom = corners[2][c] + (corners[3][c] - corners[2][c]) * sx.fraction;
          to[c * plane] = (top + (bottom - top) * sy.fraction) * kScale;
        }
      }
    }
  }
}

}  // namespace codistill
