// Small data files and jobs for the tests of the readers.

#ifndef CODISTILL_WORKER_DATA_TEST_FILES_H_
#define CODISTILL_WORKER_DATA_TEST_FILES_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "proto/job.pb.h"

namespace codistill {

// Writes a file below the test's own directory and returns its path.
std::string WriteTestFile(const std::string& name, absl::string_view content);
// The test's own directory.
std::string TestDir();

// Directory of the real data set `name`, from --test_env=CODISTILL_DATA; empty where it is absent.
std::string RealData(const std::string& name);

JobConfig ParseJob(absl::string_view text);

std::string Gzip(absl::string_view text);

// A tar archive, header by header.
class TarBuilder {
 public:
  // `type` as in the header; names of more than 100 bytes must be given by AddLongName or AddPax
  // first.
  TarBuilder& Add(const std::string& name, absl::string_view content, char type = '0');
  TarBuilder& AddDirectory(const std::string& name) { return Add(name, "", '5'); }
  TarBuilder& AddLongName(const std::string& name);  // GNU
  TarBuilder& AddPax(const std::string& key, const std::string& value);
  // The archive with its end mark.
  std::string Finish() const;
  // Without it.
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// A width x height image whose pixels are all (r, g, b).
std::string Jpeg(int width, int height, uint8_t r, uint8_t g, uint8_t b);
// RGB pixels, row by row.
std::string Png(int width, int height, absl::string_view pixels);

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_TEST_FILES_H_
