// Files of checkpoints: a manifest, or a shard's file. The first byte of an input says which, and
// whether checksums are made to fit, so that what lies behind them is met too.

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "common/base/crc32c.h"
#include "common/checkpoint/manifest.h"
#include "common/checkpoint/shard_file.h"
#include "glog/logging.h"
#include "proto/checkpoint.pb.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/memory_file_system.h"

namespace codistill {
namespace {

constexpr size_t kFixedHeader = 16;
constexpr char kManifest[] = "/c/MANIFEST-3-20";
constexpr char kShard[] = "/c/shard-0-of-2-3-20-0";

std::string LittleEndian(uint32_t value) {
  std::string bytes(4, '\0');
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<char>(value >> (8 * i));
  return bytes;
}

// A body as it would be on disk if it were whole.
std::string SealManifest(absl::string_view body) {
  return std::string(body) + LittleEndian(Crc32c(body));
}
std::string SealShardFile(const std::string& header, absl::string_view data) {
  std::string file = std::string("CDSHARD\1", 8) + LittleEndian(header.size()) +
                     LittleEndian(Crc32c(header)) + header;
  file.resize((file.size() + 63) / 64 * 64);
  file.append(data.data(), data.size());
  return file;
}

CheckpointShardHeader Header() {
  CheckpointShardHeader header;
  header.set_format_version(1);
  header.set_group("north");
  header.mutable_version()->set_generation(3);
  header.mutable_version()->set_step(20);
  header.set_shard_map_digest(77);
  for (int i = 0; i < 2; ++i) {
    CheckpointEntry* const entry = header.add_entries();
    entry->mutable_piece()->set_tensor(i);
    entry->mutable_piece()->set_count(16);
    entry->set_dtype(DT_FLOAT);
    entry->set_slot(i == 0 ? "" : "momentum");
    entry->set_offset(64 * i);
    entry->set_bytes(64);
    entry->set_crc32c(Crc32c(std::string(64, static_cast<char>(i))));
  }
  return header;
}

CheckpointManifest Manifest() {
  CheckpointManifest manifest;
  manifest.set_format_version(1);
  manifest.set_group("north");
  manifest.mutable_version()->set_generation(3);
  manifest.mutable_version()->set_step(20);
  for (int shard = 0; shard < 2; ++shard) {
    CheckpointFile* const file = manifest.add_files();
    file->set_name(ShardFileName(shard, 2, manifest.version(), 0));
    file->set_bytes(320);
  }
  return manifest;
}

void ReadAsManifest(std::string contents) {
  MemoryFileSystem files;
  files.set_contents(std::move(contents));
  ReadManifest(kManifest, &files).status().IgnoreError();
}

void ReadAsShardFile(std::string contents) {
  MemoryFileSystem files;
  files.set_contents(std::move(contents));
  const auto reader = ShardFileReader::Open(kShard, &files);
  if (!reader.ok()) return;
  (*reader)->VerifyAll().IgnoreError();
  for (int i = 0; i < (*reader)->header().entries_size(); ++i) {
    const uint64_t bytes = (*reader)->header().entries(i).bytes();
    // An open file has all that its header says, so this is no more than the input.
    CHECK_LE(bytes, size_t{1} << 30);
    std::string data(bytes, '\0');
    (*reader)->Read(i, data.data()).IgnoreError();
  }
}

}  // namespace

std::vector<std::string> FuzzSeeds() {
  const std::string data = std::string(64, '\0') + std::string(64, '\1');
  const std::string header = Header().SerializeAsString();
  return {std::string(1, 0) + SealManifest(Manifest().SerializeAsString()),
          std::string(1, 1) + Manifest().SerializeAsString(),
          std::string(1, 2) + SealShardFile(header, data),
          std::string(1, 3) + LittleEndian(header.size()) + header + data};
}

void FuzzOne(absl::string_view input) {
  if (input.empty()) return;
  const int kind = static_cast<uint8_t>(input[0]) % 4;
  input.remove_prefix(1);
  switch (kind) {
    case 0:
      ReadAsManifest(std::string(input));
      return;
    case 1:
      ReadAsManifest(SealManifest(input));
      return;
    case 2:
      ReadAsShardFile(std::string(input));
      return;
    case 3: {
      if (input.size() < 4) return;
      uint32_t length = 0;
      std::memcpy(&length, input.data(), 4);
      input.remove_prefix(4);
      const size_t cut = length % (input.size() + 1);
      ReadAsShardFile(SealShardFile(std::string(input.substr(0, cut)), input.substr(cut)));
      return;
    }
  }
}

}  // namespace codistill
