#ifndef CODISTILL_COMMON_CLIENT_CALL_GROUP_H_
#define CODISTILL_COMMON_CLIENT_CALL_GROUP_H_

#include <set>

#include "absl/status/status.h"
#include "common/base/mutex.h"
#include "common/rpc/bulk_stream.h"

namespace codistill {

// Calls to the shards of a group that succeed or fail together: the first error cancels all others
// and is the one that is told. Thread-safe.
class CallGroup {
 public:
  // The group's first error, OK so far if there is none.
  absl::Status status() const {
    MutexLock lock(&mu_);
    return status_;
  }

  // Takes note of the first error and cancels every open stream. OK does nothing.
  void Fail(const absl::Status& status) {
    if (status.ok()) return;
    MutexLock lock(&mu_);
    if (!status_.ok()) return;
    status_ = status;
    for (BulkStream* stream : open_) stream->Cancel();
  }

  // Lists a stream of the group as open for its own lifetime.
  class Member {
   public:
    Member(CallGroup* group, BulkStream* stream) : group_(group), stream_(stream) {
      MutexLock lock(&group_->mu_);
      group_->open_.insert(stream_);
      if (!group_->status_.ok()) stream_->Cancel();
    }
    ~Member() {
      MutexLock lock(&group_->mu_);
      group_->open_.erase(stream_);
    }
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;

   private:
    CallGroup* const group_;
    BulkStream* const stream_;
  };

 private:
  mutable Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::set<BulkStream*> open_ ABSL_GUARDED_BY(mu_);
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_CLIENT_CALL_GROUP_H_
