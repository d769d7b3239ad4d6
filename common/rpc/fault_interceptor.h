#ifndef CODISTILL_COMMON_RPC_FAULT_INTERCEPTOR_H_
#define CODISTILL_COMMON_RPC_FAULT_INTERCEPTOR_H_

#include <memory>
#include <string>
#include <vector>

#include "grpcpp/support/client_interceptor.h"

namespace codistill {

// Interceptors that let unary calls on their way out meet the faults of point "rpc:METHOD"
// (common/base/fault.h), e.g. "rpc:/codistill.Leader/Register". Streams of frames have their own
// (fault_stream.h); other streams are left alone. `target` is where duplicates are sent. Empty,
// at no cost, where faults are not enabled in this process.
std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>>
MakeFaultInterceptors(const std::string& target);

}  // namespace codistill

#endif  // CODISTILL_COMMON_RPC_FAULT_INTERCEPTOR_H_
