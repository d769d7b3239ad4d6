// Serves tests/benchmarks/raw_grpc.h: raw_grpc_server ELEMENTS READY_FILE.

#include <cstdio>
#include <cstdlib>

#include "common/base/deadlock_detection.h"
#include "tests/benchmarks/harness.h"
#include "tests/benchmarks/raw_grpc.h"

int main(int argc, char** argv) {
  codistill::DisableDeadlockDetection();
  codistill::RetainHeap();
  if (argc != 3) {
    std::fprintf(stderr, "usage: raw_grpc_server ELEMENTS READY_FILE\n");
    return 2;
  }
  const absl::Status status = codistill::ServeRawGrpc(std::strtoull(argv[1], nullptr, 10), argv[2]);
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}
