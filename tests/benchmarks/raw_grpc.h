#ifndef CODISTILL_TESTS_BENCHMARKS_RAW_GRPC_H_
#define CODISTILL_TESTS_BENCHMARKS_RAW_GRPC_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

// What gRPC itself moves on this machine, with nothing of the product in between: the server is an
// AsyncGenericService with one completion-queue thread, messages are ref-counted slices of 1 MiB
// over memory that is there, and each received slice is copied once into a prefaulted array. What
// the product's transfers are measured against.
namespace codistill {

// Serves arrays of `elements` floats on a port of the kernel's choice, which is written to
// `ready_file`. Returns only with an error. Element i of the served array is float(i % 1024).
absl::Status ServeRawGrpc(size_t elements, const std::string& ready_file);

// One connection to such a server. Not thread-safe.
class RawGrpcClient {
 public:
  virtual ~RawGrpcClient() = default;
  static std::unique_ptr<RawGrpcClient> Create(const std::string& address);
  // Sends all of `from`; returns when the server has copied the last element and said so.
  virtual absl::Status Push(absl::Span<const float> from) = 0;
  // Receives the server's array, copied into `to`.
  virtual absl::Status Pull(absl::Span<float> to) = 0;
};

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_RAW_GRPC_H_
