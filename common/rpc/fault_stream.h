#ifndef CODISTILL_COMMON_RPC_FAULT_STREAM_H_
#define CODISTILL_COMMON_RPC_FAULT_STREAM_H_

#include <functional>
#include <memory>
#include <string>

#include "common/rpc/bulk_stream.h"

namespace codistill {

// Opens a stream that meets the faults of point "stream:METHOD" (common/base/fault.h), whatever
// carries it:
//
//   DROP        after a few messages, or all of them, the connection is gone
//   DROP_REPLY  the call ends well over there, and as UNAVAILABLE here
//   DELAY       once, before the first message
//   DUPLICATE   all its messages arrive a second time, in a call of their own, once it ended well
//   REORDER     messages between the first and the last change places with their neighbours
//   KILL        this process, after a few messages or all of them
//
// Where faults are not enabled in this process: what `open` returns, at no cost.
std::unique_ptr<BulkStream> OpenWithFaults(const std::string& full_method,
                                           std::function<std::unique_ptr<BulkStream>()> open);

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_FAULT_STREAM_H_
