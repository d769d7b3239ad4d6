#ifndef CODISTILL_SERVER_EMBEDDING_ROW_KERNELS_H_
#define CODISTILL_SERVER_EMBEDDING_ROW_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "server/embedding/row_optimizer.h"

// The vector code of row_optimizer.cc, for the instruction set of the machine it runs on.
namespace codistill {
namespace internal {

struct RowWork {
  const RowOptimizer* optimizer;
  const RowOptimizer::Step* step;
  float* const* rows;
  const float* const* gradients;
  size_t count;
};
void ApplyToRows(const RowWork& work);

bool AllFinite(const float* x, int64_t n);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_SERVER_EMBEDDING_ROW_KERNELS_H_
