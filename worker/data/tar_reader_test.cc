#include "worker/data/tar_reader.h"

#include <string>
#include <vector>

#include "common/base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "worker/data/test_files.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::vector<TarEntry>> List(const std::string& archive) {
  auto file = FileSystem::Real()->OpenForRead(WriteTestFile("a.tar", archive));
  if (!file.ok()) return file.status();
  return ListTar(**file);
}

TEST(ListTar, FindsRegularFiles) {
  const std::string archive = TarBuilder()
                                  .AddDirectory("train/")
                                  .Add("train/a", "hello")
                                  .Add("train/link", "", '2')
                                  .Add("train/empty", "")
                                  .Add("train/b", std::string(1000, 'b'), '\0')
                                  .Finish();
  const auto entries = List(archive);
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ((*entries)[0].name, "train/a");
  EXPECT_EQ(archive.substr((*entries)[0].offset, (*entries)[0].size), "hello");
  EXPECT_EQ((*entries)[1].name, "train/empty");
  EXPECT_EQ((*entries)[1].size, 0u);
  EXPECT_EQ(archive.substr((*entries)[2].offset, (*entries)[2].size), std::string(1000, 'b'));
}

TEST(ListTar, FindsFilesBeyondItsWindow) {
  TarBuilder builder;
  for (int i = 0; i < 300; ++i) builder.Add(std::to_string(i), std::string(10000 + i, 'x'));
  const auto entries = List(builder.Finish());
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 300u);
  EXPECT_EQ((*entries)[299].name, "299");
  EXPECT_EQ((*entries)[299].size, 10299u);
}

TEST(ListTar, ReadsLongNames) {
  const std::string name = "train/" + std::string(200, 'n') + ".jpg";
  const auto entries = List(TarBuilder()
                                .AddLongName(name)
                                .Add(name.substr(0, 100), "gnu")
                                .AddPax("path", name + "2")
                                .Add(name.substr(0, 100), "pax")
                                .AddPax("mtime", "1.5")
                                .Add("short", "x")
                                .Finish());
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  EXPECT_EQ((*entries)[0].name, name);
  EXPECT_EQ((*entries)[1].name, name + "2");
  EXPECT_EQ((*entries)[2].name, "short");  // long names last for one entry only
}

TEST(ListTar, NamesWhereAnArchiveIsTruncated) {
  const std::string archive =
      TarBuilder().Add("first", "1").Add("second", std::string(2000, '2')).Finish();
  for (size_t length = 0; length < archive.size() - 1024 + 512; length += 128) {
    const absl::Status status = List(archive.substr(0, length)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << length;
    EXPECT_THAT(std::string(status.message()), HasSubstr("a.tar"));
    EXPECT_THAT(std::string(status.message()), HasSubstr("truncated"));
  }
  EXPECT_THAT(std::string(List(archive.substr(0, 2000)).status().message()),
              HasSubstr("at byte 1024: truncated: entry second has 2000 bytes, but the file ends "
                        "after 464"));
  EXPECT_THAT(std::string(List(archive.substr(0, 1024)).status().message()),
              HasSubstr("ends without its end mark after first"));
}

TEST(ListTar, RefusesDamage) {
  std::string archive = TarBuilder().Add("first", "1").Add("second", "2").Finish();
  archive[1024 + 3] ^= 1;  // in the second name
  EXPECT_THAT(std::string(List(archive).status().message()),
              HasSubstr("at byte 1024: damaged header, or no tar archive after first"));
  EXPECT_THAT(std::string(List(std::string(2000, 'x')).status().message()),
              HasSubstr("at byte 0: damaged header, or no tar archive"));
  EXPECT_EQ(List(TarBuilder().Add("PaxHeader", "5 path", 'x').Finish()).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(List(TarBuilder().Add("s", "", 'S').Finish()).status().message()),
              HasSubstr("entry s is sparse"));
  // A size that would wrap around.
  EXPECT_EQ(List(TarBuilder().AddPax("size", "18446744073709551615").Add("x", "").Finish())
                .status()
                .code(),
            absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace codistill
