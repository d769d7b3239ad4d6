#include "common/base/status.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace codistill {

absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok() || context.empty()) return status;
  absl::Status annotated(status.code(), status.message().empty()
                                            ? std::string(context)
                                            : absl::StrCat(context, ": ", status.message()));
  status.ForEachPayload([&annotated](absl::string_view type_url, const absl::Cord& payload) {
    annotated.SetPayload(type_url, payload);
  });
  return annotated;
}

void ErrorList::Add(absl::string_view message) {
  if (messages_.size() < max_errors_) {
    messages_.emplace_back(message);
  } else {
    ++dropped_;
  }
}

void ErrorList::Add(const absl::Status& status) {
  if (!status.ok()) Add(status.message());
}

void ErrorList::Add(absl::string_view field, absl::string_view message) {
  Add(absl::StrCat(field, ": ", message));
}

absl::Status ErrorList::ToStatus(absl::string_view heading) const {
  if (messages_.empty() && dropped_ == 0) return absl::OkStatus();
  std::string text = absl::StrJoin(messages_, "\n");
  if (!heading.empty()) text = absl::StrCat(heading, "\n", text);
  if (dropped_ > 0) absl::StrAppend(&text, "\n(and ", dropped_, " more errors)");
  return absl::InvalidArgumentError(text);
}

}  // namespace codistill
