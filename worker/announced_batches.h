#ifndef CODISTILL_WORKER_ANNOUNCED_BATCHES_H_
#define CODISTILL_WORKER_ANNOUNCED_BATCHES_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "worker/teacher_source.h"

// What sources of teacher predictions that work ahead of need have in common. An Entry has the
// announced `batch` and whether it has `passed`: nobody wants its predictions any more.
namespace codistill {

// Batches kept beyond those the job prefetches: the one in hand, and chained ones whose step has
// passed.
inline constexpr size_t kExtraBatches = 8;

// The entry of `batch`; null if it has not been announced, or has passed.
template <typename Entry>
std::shared_ptr<Entry> FindBatch(const std::deque<std::shared_ptr<Entry>>& entries,
                                 const TeacherBatch& batch) {
  for (const auto& entry : entries) {
    if (!entry->passed && entry->batch->SameAs(batch)) return entry;
  }
  return nullptr;
}

// Under the policy FAIL: at `step` the predictions of these teachers were `missing` after `wait`.
inline absl::Status MissingPredictions(int64_t step, const std::vector<std::string>& missing,
                                       absl::Duration wait, const std::string& last_error) {
  return absl::UnavailableError(absl::StrCat(
      "codistillation.on_teacher_loss is FAIL, and at step ", step,
      " there were no predictions of ", absl::StrJoin(missing, ", "), " after ",
      absl::FormatDuration(wait), last_error.empty() ? "" : "; last error: ", last_error));
}

}  // namespace codistill

#endif  // CODISTILL_WORKER_ANNOUNCED_BATCHES_H_
