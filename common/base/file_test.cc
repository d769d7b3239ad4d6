#include "common/base/file.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "common/base/crc32c.h"
#include "common/base/fault_injecting_file_system.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Operation = FaultInjectingFileSystem::Operation;

constexpr size_t kMax = 1 << 20;

class FileTest : public ::testing::Test {
 protected:
  FileTest() {
    dir_ = JoinPath(::testing::TempDir(), "file_test", std::to_string(getpid()),
                    ::testing::UnitTest::GetInstance()->current_test_info()->name());
    EXPECT_TRUE(RemoveAll(dir_).ok());
    EXPECT_TRUE(real_->MakeDirs(dir_).ok());
  }
  ~FileTest() override { EXPECT_TRUE(RemoveAll(dir_).ok()); }

  std::string Path(absl::string_view name) const { return JoinPath(dir_, name); }
  std::vector<std::string> List() const { return real_->ListDir(dir_).value(); }

  FileSystem* const real_ = FileSystem::Real();
  FaultInjectingFileSystem faulty_;
  std::string dir_;
};

TEST(PathTest, JoinsAndSplits) {
  EXPECT_EQ(JoinPath("a", "b"), "a/b");
  EXPECT_EQ(JoinPath("a/", "b"), "a/b");
  EXPECT_EQ(JoinPath("", "b"), "b");
  EXPECT_EQ(JoinPath("a", ""), "a");
  EXPECT_EQ(JoinPath("a", "/b"), "/b");
  EXPECT_EQ(JoinPath("/", "a", "b", "c"), "/a/b/c");
  EXPECT_EQ(DirName("a/b"), "a");
  EXPECT_EQ(DirName("/b"), "/");
  EXPECT_EQ(DirName("b"), ".");
  EXPECT_EQ(BaseName("a/b"), "b");
  EXPECT_EQ(BaseName("b"), "b");
}

TEST_F(FileTest, WritesAtomicallyAndReadsBack) {
  const std::string path = Path("x");
  ASSERT_TRUE(WriteFileAtomically(path, "first").ok());
  ASSERT_TRUE(WriteFileAtomically(path, std::string("sec\0nd", 6)).ok());
  EXPECT_EQ(ReadFile(path, kMax).value(), std::string("sec\0nd", 6));
  ASSERT_TRUE(WriteFileAtomically(path, "").ok());
  EXPECT_EQ(ReadFile(path, kMax).value(), "");
  EXPECT_THAT(List(), ElementsAre("x"));
}

TEST_F(FileTest, ReadErrorsNameThePath) {
  EXPECT_EQ(ReadFile(Path("absent"), kMax).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(ReadFile(Path("absent"), kMax).status().message()),
              HasSubstr(Path("absent")));
  EXPECT_EQ(ReadFile(dir_, kMax).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(WriteFileAtomically(Path("big"), std::string(100, 'x')).ok());
  const absl::Status too_big = ReadFile(Path("big"), 99).status();
  EXPECT_EQ(too_big.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(too_big.message()), HasSubstr("is 100 bytes long; at most 99"));
  EXPECT_EQ(ReadFile(Path("big"), 100).value(), std::string(100, 'x'));
  ASSERT_EQ(mkfifo(Path("fifo").c_str(), 0600), 0);
  EXPECT_EQ(ReadFile(Path("fifo"), kMax).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(FileTest, ReadAtReadsExactlyOrSaysWhereTheFileEnds) {
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "0123456789").ok());
  auto file = real_->OpenForRead(Path("x")).value();
  EXPECT_EQ(file->size(), 10u);
  char buffer[4];
  ASSERT_TRUE(file->ReadAt(3, 4, buffer).ok());
  EXPECT_EQ(std::string(buffer, 4), "3456");
  const absl::Status past = file->ReadAt(8, 4, buffer);
  EXPECT_EQ(past.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(past.message()), HasSubstr("ends at byte 10; 2 more"));
}

TEST_F(FileTest, FullDiskKeepsTheOldContentAndLeavesNoTemporary) {
  const std::string path = Path("x");
  ASSERT_TRUE(WriteFileAtomically(path, "old").ok());
  faulty_.FailWritesAfter(4);
  const absl::Status status = WriteFileAtomically(path, "0123456789", &faulty_);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("while writing 10 bytes to " + path));
  EXPECT_THAT(std::string(status.message()), HasSubstr("No space left"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("4 of 10 bytes written"));
  EXPECT_EQ(ReadFile(path, kMax).value(), "old");
  EXPECT_THAT(List(), ElementsAre("x"));
  faulty_.Heal();
  EXPECT_TRUE(WriteFileAtomically(path, "0123456789", &faulty_).ok());
  EXPECT_EQ(ReadFile(path, kMax).value(), "0123456789");
}

TEST_F(FileTest, EveryFailingStepKeepsTheOldContent) {
  const std::string path = Path("x");
  ASSERT_TRUE(WriteFileAtomically(path, "old").ok());
  for (Operation operation :
       {Operation::kCreate, Operation::kSync, Operation::kClose, Operation::kRename}) {
    faulty_.Fail(operation, EIO);
    EXPECT_FALSE(WriteFileAtomically(path, "new", &faulty_).ok());
    EXPECT_EQ(ReadFile(path, kMax).value(), "old");
    EXPECT_THAT(List(), ElementsAre("x"));
    faulty_.Heal();
  }
  faulty_.Fail(Operation::kSyncDir, EIO);
  EXPECT_FALSE(WriteFileAtomically(path, "new", &faulty_).ok());
  EXPECT_THAT(List(), ElementsAre("x"));
}

TEST_F(FileTest, SyncsFileAndDirectory) {
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "data", &faulty_).ok());
  EXPECT_EQ(faulty_.calls(Operation::kSync), 1);
  EXPECT_EQ(faulty_.calls(Operation::kSyncDir), 1);
}

TEST_F(FileTest, ShortWritesAreContinued) {
  faulty_.ShortWrites(3);
  ASSERT_TRUE(WriteFileAtomically(Path("x"), "0123456789", &faulty_).ok());
  EXPECT_EQ(ReadFile(Path("x"), kMax).value(), "0123456789");
}

TEST_F(FileTest, RecognisesItsTemporaries) {
  // A writer killed before the rename leaves the temporary.
  faulty_.Fail(Operation::kRename, EIO);
  faulty_.Fail(Operation::kRemoveFile, EIO);
  EXPECT_FALSE(WriteFileAtomically(Path("x"), "new", &faulty_).ok());
  ASSERT_EQ(List().size(), 1u);
  EXPECT_TRUE(IsTemporaryFile(List()[0])) << List()[0];
  EXPECT_FALSE(IsTemporaryFile("x"));
  EXPECT_FALSE(IsTemporaryFile("x.tmp-123"));
}

TEST_F(FileTest, ExclusiveCreationHasOneWinner) {
  ASSERT_TRUE(CreateFileExclusively(Path("claim"), "me").ok());
  EXPECT_EQ(CreateFileExclusively(Path("claim"), "you").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ReadFile(Path("claim"), kMax).value(), "me");
  faulty_.FailWritesAfter(1);
  EXPECT_EQ(CreateFileExclusively(Path("other"), "me", &faulty_).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(List(), ElementsAre("claim"));
}

TEST_F(FileTest, FileWriterSumsWhatItWrites) {
  std::string expected;
  auto writer = FileWriter::Create(Path("x")).value();
  for (size_t n : {10, 100000, 0, 64 << 10, 1, 70000, 5}) {
    const std::string piece(n, static_cast<char>('a' + n % 26));
    ASSERT_TRUE(writer->Append(piece).ok());
    expected += piece;
  }
  EXPECT_EQ(writer->bytes(), expected.size());
  EXPECT_EQ(writer->crc32c(), Crc32c(expected));
  ASSERT_TRUE(writer->SyncAndClose().ok());
  EXPECT_TRUE(writer->SyncAndClose().ok());
  EXPECT_EQ(writer->Append("more").code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ReadFile(Path("x"), kMax).value(), expected);
}

TEST_F(FileTest, FileWriterFailsForGoodAndRemovesThePartialFile) {
  faulty_.FailWritesAfter(100000);
  auto writer = FileWriter::Create(Path("x"), &faulty_).value();
  ASSERT_TRUE(writer->Append(std::string(90000, 'a')).ok());
  const absl::Status status = writer->Append(std::string(90000, 'b'));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr(Path("x")));
  faulty_.Heal();
  EXPECT_EQ(writer->Append("c"), status);
  EXPECT_EQ(writer->SyncAndClose(), status);
  EXPECT_THAT(List(), IsEmpty());
}

TEST_F(FileTest, FileWriterReportsAFullDiskFoundByTheLastFlush) {
  faulty_.FailWritesAfter(2);
  auto writer = FileWriter::Create(Path("x"), &faulty_).value();
  ASSERT_TRUE(writer->Append("abc").ok());  // still in the buffer
  EXPECT_EQ(writer->SyncAndClose().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(List(), IsEmpty());
}

// Longer than what may wait in memory for the disk, in pieces that fit no stretch.
TEST_F(FileTest, LongFilesArriveWhole) {
  auto writer = FileWriter::Create(Path("x")).value();
  std::string piece(3000001, 'a');
  uint32_t crc = 0;
  for (int i = 0; i < 30; ++i) {
    piece[i] = static_cast<char>(i);
    crc = Crc32cExtend(crc, piece);
    // Summed by us or by the caller, piece by piece.
    ASSERT_TRUE(
        (i % 2 == 0 ? writer->Append(piece) : writer->AppendSummed(piece, Crc32c(piece))).ok());
  }
  ASSERT_TRUE(writer->SyncAndClose().ok());
  EXPECT_EQ(writer->crc32c(), crc);
  EXPECT_EQ(writer->bytes(), 30 * piece.size());
  const auto all = ReadFile(Path("x"), size_t{1} << 30);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->size(), 30 * piece.size());
  EXPECT_EQ(Crc32c(*all), crc);
}

TEST_F(FileTest, AbandonedFileWriterLeavesNothing) {
  FileWriter::Create(Path("x")).value()->Append("abc").IgnoreError();
  EXPECT_THAT(List(), IsEmpty());
}

TEST_F(FileTest, DirectoriesAreMadeListedAndRemoved) {
  const std::string deep = Path("a/b/c");
  ASSERT_TRUE(real_->MakeDirs(deep).ok());
  ASSERT_TRUE(real_->MakeDirs(deep + "/").ok());
  EXPECT_TRUE(real_->IsDirectory(deep));
  ASSERT_TRUE(WriteFileAtomically(JoinPath(deep, "f"), "x").ok());
  EXPECT_EQ(real_->MakeDirs(JoinPath(deep, "f", "g")).code(),
            absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(WriteFileAtomically(Path("outside"), "keep").ok());
  ASSERT_EQ(symlink(dir_.c_str(), JoinPath(deep, "link").c_str()), 0);
  EXPECT_THAT(real_->ListDir(deep).value(), ElementsAre("f", "link"));
  ASSERT_TRUE(RemoveAll(Path("a")).ok());
  EXPECT_TRUE(RemoveAll(Path("a")).ok());
  EXPECT_FALSE(real_->Exists(Path("a")));
  EXPECT_TRUE(real_->Exists(Path("outside")));  // the link was not followed
  EXPECT_EQ(real_->ListDir(Path("a")).status().code(), absl::StatusCode::kNotFound);
}

TEST(FileErrorTest, MapsErrnoToCodes) {
  EXPECT_EQ(FileError(ENOSPC, "write", "/d/f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FileError(EDQUOT, "write", "/d/f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FileError(EFBIG, "write", "/d/f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FileError(EACCES, "open", "/d/f").code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(FileError(ENOENT, "open", "/d/f").message(), "open /d/f: No such file or directory");
}

}  // namespace
}  // namespace codistill
