#ifndef CODISTILL_COMMON_HTTP_STATUS_PAGE_H_
#define CODISTILL_COMMON_HTTP_STATUS_PAGE_H_

#include <string>

#include "absl/strings/string_view.h"
#include "proto/control.pb.h"

namespace codistill {

// A daemon's status as one HTML page that needs nothing else (no script, no other file). Parts that
// the daemon does not have are left out; everything that comes from outside is escaped.
std::string RenderStatusPage(const DaemonStatus& status);

// The same as JSON: proto field names, zero values printed.
std::string RenderStatusJson(const DaemonStatus& status);

// For text between tags and in quoted attributes.
std::string EscapeHtml(absl::string_view text);

}  // namespace codistill

#endif  // CODISTILL_COMMON_HTTP_STATUS_PAGE_H_
