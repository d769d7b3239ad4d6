#include "common/base/streaming_copy.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace codistill {
namespace {

// Below this the beginning and the end, which are copied as usual, are most of it.
constexpr size_t kSmall = 4096;
constexpr size_t kLine = 64;

}  // namespace

void StreamingCopy(void* to, const void* from, size_t size) {
#if defined(__SSE2__)
  if (size >= kSmall) {
    auto* target = static_cast<char*>(to);
    auto* source = static_cast<const char*>(from);
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(target) % kLine) % kLine;
    std::memcpy(target, source, head);
    target += head;
    source += head;
    size -= head;
    // Whole lines, so that the processor's write-combining buffers leave full.
    for (; size >= kLine; size -= kLine, target += kLine, source += kLine) {
      const auto* const in = reinterpret_cast<const __m128i*>(source);
      auto* const out = reinterpret_cast<__m128i*>(target);
      const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
      const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
      _mm_stream_si128(out, a);
      _mm_stream_si128(out + 1, b);
      _mm_stream_si128(out + 2, c);
      _mm_stream_si128(out + 3, d);
    }
    _mm_sfence();  // streamed writes are not ordered with others
    to = target;
    from = source;
  }
#endif
  if (size > 0) std::memcpy(to, from, size);
}

}  // namespace codistill
