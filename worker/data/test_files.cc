#include "worker/data/test_files.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "glog/logging.h"
#include "google/protobuf/text_format.h"
#include "png.h"
#include "turbojpeg.h"
#include "zlib.h"

namespace codistill {

std::string TestDir() { return std::getenv("TEST_TMPDIR"); }

std::string WriteTestFile(const std::string& name, absl::string_view content) {
  const std::string path = JoinPath(TestDir(), name);
  CHECK(FileSystem::Real()->MakeDirs(DirName(path)).ok());
  CHECK(WriteFileAtomically(path, content).ok());
  return path;
}

std::string RealData(const std::string& name) {
  const char* root = std::getenv("CODISTILL_DATA");
  if (root == nullptr) return "";
  const std::string path = JoinPath(root, name);
  return FileSystem::Real()->IsDirectory(path) ? path : "";
}

JobConfig ParseJob(absl::string_view text) {
  JobConfig job;
  CHECK(google::protobuf::TextFormat::ParseFromString(std::string(text), &job)) << text;
  return job;
}

std::string Gzip(absl::string_view text) {
  z_stream stream{};
  CHECK_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(&out[0]);
  stream.avail_out = static_cast<uInt>(out.size());
  CHECK_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

TarBuilder& TarBuilder::Add(const std::string& name, absl::string_view content, char type) {
  char header[512] = {};
  std::strncpy(header, name.c_str(), 100);
  std::strcpy(header + 100, "0000644");
  absl::SNPrintF(header + 124, 12, "%011o", content.size());
  std::memset(header + 148, ' ', 8);
  header[156] = type;
  std::memcpy(header + 257, "ustar\00000", 8);
  unsigned sum = 0;
  for (const char c : header) sum += static_cast<unsigned char>(c);
  absl::SNPrintF(header + 148, 8, "%06o", sum);
  bytes_.append(header, sizeof(header));
  bytes_.append(content.data(), content.size());
  bytes_.append((512 - content.size() % 512) % 512, '\0');
  return *this;
}

TarBuilder& TarBuilder::AddLongName(const std::string& name) {
  return Add("././@LongLink", name + '\0', 'L');
}

TarBuilder& TarBuilder::AddPax(const std::string& key, const std::string& value) {
  const std::string rest = absl::StrCat(" ", key, "=", value, "\n");
  size_t length = rest.size() + 1;
  while (absl::StrCat(length).size() + rest.size() != length) ++length;
  return Add("PaxHeader", absl::StrCat(length, rest), 'x');
}

std::string TarBuilder::Finish() const { return bytes_ + std::string(1024, '\0'); }

std::string Jpeg(int width, int height, uint8_t r, uint8_t g, uint8_t b) {
  std::vector<uint8_t> pixels;
  for (int i = 0; i < width * height; ++i) pixels.insert(pixels.end(), {r, g, b});
  tjhandle handle = tjInitCompress();
  unsigned char* out = nullptr;
  unsigned long size = 0;
  CHECK_EQ(tjCompress2(handle, pixels.data(), width, 0, height, TJPF_RGB, &out, &size, TJSAMP_444,
                       95, 0),
           0);
  std::string bytes(reinterpret_cast<char*>(out), size);
  tjFree(out);
  tjDestroy(handle);
  return bytes;
}

std::string Png(int width, int height, absl::string_view pixels) {
  CHECK_EQ(pixels.size(), static_cast<size_t>(width * height * 3));
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = width;
  image.height = height;
  image.format = PNG_FORMAT_RGB;
  png_alloc_size_t size = 0;
  CHECK(png_image_write_to_memory(&image, nullptr, &size, 0, pixels.data(), 0, nullptr));
  std::string bytes(size, '\0');
  CHECK(png_image_write_to_memory(&image, &bytes[0], &size, 0, pixels.data(), 0, nullptr));
  bytes.resize(size);
  return bytes;
}

}  // namespace codistill
