#include "common/rpc/call_registry.h"

#include <utility>
#include <vector>

namespace codistill {

absl::Status CallRegistry::Add(const std::shared_ptr<ParkedCall>& call) {
  MutexLock lock(&mu_);
  if (closed_.ok()) calls_[call.get()] = call;
  return closed_;
}

void CallRegistry::Remove(ParkedCall* call) {
  MutexLock lock(&mu_);
  calls_.erase(call);
}

void CallRegistry::FinishAll(absl::Status status) {
  std::vector<std::shared_ptr<ParkedCall>> open;
  {
    MutexLock lock(&mu_);
    if (closed_.ok()) closed_ = status;
    for (const auto& entry : calls_) {
      if (std::shared_ptr<ParkedCall> call = entry.second.lock()) open.push_back(std::move(call));
    }
  }
  for (const std::shared_ptr<ParkedCall>& call : open) call->EndForShutdown(status);
}

size_t CallRegistry::size() const {
  MutexLock lock(&mu_);
  return calls_.size();
}

}  // namespace codistill
