// The kernels on the processor, for tests (cuda/testing/emulated_cuda.h).
#include "cuda/conversion.cu"
