#ifndef CODISTILL_SERVER_GROUP_CHECK_H_
#define CODISTILL_SERVER_GROUP_CHECK_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// PERMISSION_DENIED unless a call is meant for this run and group; says whose it is.
inline absl::Status CheckGroup(const GroupRef& theirs, const GroupRef& ours) {
  if (theirs.run_id() == ours.run_id() && theirs.group() == ours.group()) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat("this is group ", ours.group(), " of run ",
                                                  ours.run_id(), "; the call is for group ",
                                                  theirs.group(), " of run ", theirs.run_id()));
}

}  // namespace codistill

#endif  // CODISTILL_SERVER_GROUP_CHECK_H_
