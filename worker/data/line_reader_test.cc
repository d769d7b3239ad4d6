#include "worker/data/line_reader.h"

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// All lines; `status` is that of the last call.
std::vector<std::string> Lines(const std::string& path, absl::Status* status) {
  std::vector<std::string> lines;
  auto reader = LineReader::Open(path);
  *status = reader.status();
  while (status->ok()) {
    absl::string_view line;
    const auto more = (*reader)->Next(&line);
    *status = more.status();
    if (!more.ok() || !*more) break;
    lines.emplace_back(line);
    EXPECT_EQ((*reader)->line_number(), static_cast<int64_t>(lines.size()));
  }
  return lines;
}

TEST(LineReader, ReadsLines) {
  absl::Status status;
  EXPECT_THAT(Lines(WriteTestFile("a", "one\n\n three \r\nfour"), &status),
              ElementsAre("one", "", " three ", "four"));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Lines(WriteTestFile("b", "end\n"), &status), ElementsAre("end"));
  EXPECT_THAT(Lines(WriteTestFile("c", ""), &status), IsEmpty());
  EXPECT_TRUE(status.ok()) << status;
}

TEST(LineReader, ReadsLinesAcrossBlocksPlainAndCompressed) {
  std::string text;
  std::vector<std::string> expected;
  for (int i = 0; i < 20000; ++i) {
    expected.push_back(absl::StrCat(i, std::string(i % 97, 'x')));
    absl::StrAppend(&text, expected.back(), "\n");
  }
  expected.push_back(std::string(1000000, 'y'));  // longer than a block
  absl::StrAppend(&text, expected.back());
  absl::Status status;
  EXPECT_EQ(Lines(WriteTestFile("long", text), &status), expected);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(Lines(WriteTestFile("long.gz", Gzip(text)), &status), expected);
  EXPECT_TRUE(status.ok()) << status;
}

TEST(LineReader, ReadsConcatenatedGzipFiles) {
  absl::Status status;
  EXPECT_THAT(Lines(WriteTestFile("two.gz", Gzip("a\nb") + Gzip("c\n") + Gzip("")), &status),
              ElementsAre("a", "bc"));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Lines(WriteTestFile("none.gz", Gzip("")), &status), IsEmpty());
  EXPECT_TRUE(status.ok()) << status;
}

TEST(LineReader, NamesATruncatedOrDamagedGzipFile) {
  std::string text;
  for (int i = 0; i < 10000; ++i) absl::StrAppend(&text, i * i, "\n");
  const std::string good = Gzip(text);
  for (const size_t length : {size_t{0}, size_t{5}, good.size() / 2, good.size() - 1}) {
    absl::Status status;
    const std::string path = WriteTestFile("short.gz", good.substr(0, length));
    Lines(path, &status);
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << length;
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
    EXPECT_THAT(std::string(status.message()), HasSubstr("truncated"));
  }
  absl::Status status;
  std::string damaged = good;
  damaged[good.size() / 2] ^= 0x55;
  Lines(WriteTestFile("damaged.gz", damaged), &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("damaged.gz: damaged or no gzip file"));
  Lines(WriteTestFile("plain.gz", "plain text\n"), &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no gzip file"));
}

TEST(LineReader, RefusesWhatIsNoText) {
  absl::Status status;
  Lines(WriteTestFile("binary", "a\n" + std::string(17 << 20, 'x')), &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("binary:2: a line of more than"));
  Lines(TestDir() + "/absent", &status);
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace codistill
