#include "common/base/streaming_copy.h"

#include <cstdint>
#include <cstring>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/base/streaming_copy.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kCopyLine = 64;
// Memory is asked for so far ahead: one core's own prefetching does not use all of it.
constexpr size_t kCopyAhead = 4096;

template <bool kStream>
void CopyLines(const uint8_t* from, size_t size, uint8_t* to) {
  const hn::CappedTag<uint8_t, kCopyLine> d;
  constexpr size_t kLanes = hn::MaxLanes(d);
  constexpr size_t kVectors = kCopyLine / kLanes;
  for (size_t at = 0; at < size; at += kCopyLine) {
    hwy::Prefetch(from + at + kCopyAhead);
    hn::Vec<decltype(d)> line[kVectors];
    for (size_t v = 0; v < kVectors; ++v) line[v] = hn::LoadU(d, from + at + v * kLanes);
    for (size_t v = 0; v < kVectors; ++v) {
      if (kStream) {
        hn::Stream(line[v], d, to + at + v * kLanes);
      } else {
        hn::StoreU(line[v], d, to + at + v * kLanes);
      }
    }
  }
}

// `to` is at the beginning of a line of the cache, and `size` in whole lines, so that the
// processor's write-combining buffers leave full.
void StreamLines(const uint8_t* from, size_t size, uint8_t* to) {
  CopyLines<true>(from, size, to);
  hwy::FlushStream();  // streamed writes are not ordered with others
}
void StoreLines(const uint8_t* from, size_t size, uint8_t* to) { CopyLines<false>(from, size, to); }

}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(StreamLines);
HWY_EXPORT(StoreLines);

}  // namespace internal

namespace {

// Below this the beginning and the end, which are copied as usual, are most of it.
constexpr size_t kSmall = 4096;
constexpr size_t kLine = 64;

}  // namespace

void StreamingCopy(void* to, const void* from, size_t size) {
  auto* target = static_cast<uint8_t*>(to);
  auto* source = static_cast<const uint8_t*>(from);
  if (size >= kSmall) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
    std::memcpy(target, source, head);
    const size_t lines = (size - head) / kLine * kLine;
    HWY_DYNAMIC_DISPATCH(internal::StreamLines)(source + head, lines, target + head);
    target += head + lines;
    source += head + lines;
    size -= head + lines;
  }
  if (size > 0) std::memcpy(target, source, size);
}

void PrefetchingCopy(void* to, const void* from, size_t size) {
  auto* target = static_cast<uint8_t*>(to);
  auto* source = static_cast<const uint8_t*>(from);
  const size_t lines = size < kSmall ? 0 : size / kLine * kLine;
  if (lines > 0) HWY_DYNAMIC_DISPATCH(internal::StoreLines)(source, lines, target);
  if (size > lines) std::memcpy(target + lines, source + lines, size - lines);
}

}  // namespace codistill
#endif
