#include "common/base/parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

namespace codistill {

void ParallelFor(int threads, int64_t n, int64_t grain,
                 absl::FunctionRef<void(int64_t begin, int64_t end)> body) {
  if (n <= 0) return;
  const int64_t ranges =
      std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, std::max(threads, 1));
  // Boundaries differ by at most one element, with no product that could overflow.
  const int64_t base = n / ranges, extra = n % ranges;
  auto begin_of = [base, extra](int64_t r) { return base * r + std::min(r, extra); };
  std::vector<std::thread> others;
  others.reserve(ranges - 1);
  for (int64_t r = 1; r < ranges; ++r) {
    others.emplace_back([&body, begin = begin_of(r), end = begin_of(r + 1)] { body(begin, end); });
  }
  body(0, begin_of(1));
  for (std::thread& other : others) other.join();
}

}  // namespace codistill
