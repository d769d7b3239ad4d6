#ifndef CODISTILL_WORKER_DATA_IMAGE_DECODER_H_
#define CODISTILL_WORKER_DATA_IMAGE_DECODER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace codistill {

// An image in memory: 8-bit RGB, interleaved, row by row.
struct Image {
  int width = 0;
  int height = 0;
  std::vector<uint8_t> pixels;  // [height, width, 3]
};

// Decodes JPEG and PNG, told apart by their first bytes. Grey images become RGB; transparency is
// put on black. Keeps a decompressor between images: one object a thread, not thread-safe.
class ImageDecoder {
 public:
  ImageDecoder();
  ~ImageDecoder();
  ImageDecoder(const ImageDecoder&) = delete;
  ImageDecoder& operator=(const ImageDecoder&) = delete;

  // DATA_LOSS: damaged or truncated (the decoder's own words); INVALID_ARGUMENT: neither JPEG nor
  // PNG, or larger than 64 million pixels. The caller names the image.
  absl::Status Decode(absl::string_view bytes, Image* image);

 private:
  absl::Status DecodeJpeg(absl::string_view bytes, Image* image);
  absl::Status DecodePng(absl::string_view bytes, Image* image);

  void* jpeg_ = nullptr;  // tjhandle
};

// How an example is varied in training.
struct Augmentation {
  bool flip = false;  // left to right
  // Where the crop begins in the image padded by `padding` on every side: 0 .. 2 * padding;
  // `padding` itself changes nothing.
  int64_t padding = 0;
  int64_t crop_x = 0;
  int64_t crop_y = 0;
};

// Writes `image` as FLOAT [3, height, width] with values in [0, 1] to `out`: resized (bilinear,
// pixel centres at half integers) where its size differs, then augmented; what the crop takes from
// outside is black.
void ToPlanes(const Image& image, int64_t height, int64_t width, const Augmentation& augmentation,
              float* out);

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_IMAGE_DECODER_H_
