// CRC-32C (Castagnoli polynomial, as in RFC 3720): guards files and frames against damage.

#ifndef CODISTILL_COMMON_BASE_CRC32C_H_
#define CODISTILL_COMMON_BASE_CRC32C_H_

#include <cstdint>

#include "absl/strings/string_view.h"

namespace codistill {

// The checksum of the bytes so far followed by `data`, given the checksum of the bytes so far. The
// checksum of nothing is 0. Uses the SSE4.2 instruction where the processor has it.
uint32_t Crc32cExtend(uint32_t crc, absl::string_view data);

inline uint32_t Crc32c(absl::string_view data) { return Crc32cExtend(0, data); }

// The checksum of a + b from those of a and b, so that parts can be summed apart or in parallel.
uint32_t Crc32cConcat(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

namespace internal {

// The two implementations behind Crc32cExtend, for tests. The hardware one may be called only where
// Crc32cHardwareAvailable().
bool Crc32cHardwareAvailable();
uint32_t Crc32cExtendHardware(uint32_t crc, absl::string_view data);
uint32_t Crc32cExtendPortable(uint32_t crc, absl::string_view data);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_CRC32C_H_
