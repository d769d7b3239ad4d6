#ifndef CODISTILL_WORKER_DATA_TAR_READER_H_
#define CODISTILL_WORKER_DATA_TAR_READER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/file_system.h"

namespace codistill {

// A regular file inside a tar archive.
struct TarEntry {
  std::string name;
  uint64_t offset = 0;  // of its first byte, in the archive
  uint64_t size = 0;    // in bytes
};

// The regular files of an uncompressed tar archive (ustar, and the long names and sizes of GNU and
// pax), in their order. Reads headers only. DATA_LOSS names the archive, the offset, and the entry
// where the archive is truncated or a header is damaged; directories, links and devices are
// skipped.
absl::StatusOr<std::vector<TarEntry>> ListTar(const ReadableFile& archive);

}  // namespace codistill

#endif  // CODISTILL_WORKER_DATA_TAR_READER_H_
