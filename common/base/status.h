// Helpers around absl::Status, the only error channel of this project.
//
//   CODISTILL_RETURN_IF_ERROR(file.Append(bytes));
//   CODISTILL_ASSIGN_OR_RETURN(std::string text, ReadFile(path, kMaxJobBytes));
//   return Annotate(status, absl::StrCat("while reading ", path));
//
// Validation that wants to tell everything that is wrong in one go collects into an ErrorList.

#ifndef CODISTILL_COMMON_BASE_STATUS_H_
#define CODISTILL_COMMON_BASE_STATUS_H_

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// The same code and payloads with "context: " put before the message. OK stays OK, and an empty
// context changes nothing.
absl::Status Annotate(const absl::Status& status, absl::string_view context);

// Collects errors and yields them as one status, one message a line in the order of arrival. Keeps
// at most `max_errors` messages so that a hostile input cannot grow it without bound; the rest is
// counted in a last line. Not thread-safe.
class ErrorList {
 public:
  explicit ErrorList(size_t max_errors = 100) : max_errors_(max_errors) {}

  void Add(absl::string_view message);
  // Adds the message of a failed status; OK is ignored.
  void Add(const absl::Status& status);
  // "field: message", the form in which configuration errors name their place.
  void Add(absl::string_view field, absl::string_view message);

  bool empty() const { return messages_.empty(); }
  size_t size() const { return messages_.size() + dropped_; }
  const std::vector<std::string>& messages() const { return messages_; }

  // OK when nothing was added, else INVALID_ARGUMENT. `heading`, when not empty, becomes the first
  // line.
  absl::Status ToStatus(absl::string_view heading = "") const;

 private:
  size_t max_errors_;
  size_t dropped_ = 0;
  std::vector<std::string> messages_;
};

namespace internal {

inline const absl::Status& GetStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& GetStatus(const absl::StatusOr<T>& status) {
  return status.status();
}

}  // namespace internal
}  // namespace codistill

#define CODISTILL_INTERNAL_CONCAT_(a, b) a##b
#define CODISTILL_INTERNAL_CONCAT(a, b) CODISTILL_INTERNAL_CONCAT_(a, b)

// Returns the status of `expr` (a Status or StatusOr) from the enclosing function unless it is OK.
#define CODISTILL_RETURN_IF_ERROR(expr)                                          \
  do {                                                                           \
    auto&& codistill_status = (expr);                                            \
    if (!::codistill::internal::GetStatus(codistill_status).ok()) {              \
      return ::absl::Status(::codistill::internal::GetStatus(codistill_status)); \
    }                                                                            \
  } while (false)

// Moves the value of `expr` (a StatusOr) into `lhs`, which may declare a variable, or returns its
// status. Two statements: needs braces after an if.
#define CODISTILL_ASSIGN_OR_RETURN(lhs, expr)                                                    \
  CODISTILL_INTERNAL_ASSIGN_OR_RETURN(CODISTILL_INTERNAL_CONCAT(codistill_status_or_, __LINE__), \
                                      lhs, expr)
#define CODISTILL_INTERNAL_ASSIGN_OR_RETURN(result, lhs, expr) \
  auto result = (expr);                                        \
  if (!result.ok()) return std::move(result).status();         \
  lhs = std::move(result).value()

#endif  // CODISTILL_COMMON_BASE_STATUS_H_
