#ifndef CODISTILL_COMMON_BASE_BLAS_KERNELS_H_
#define CODISTILL_COMMON_BASE_BLAS_KERNELS_H_

#include <string>

namespace codistill {

// OpenBLAS, which computes libtorch's matrix products on Debian, picks its kernels by the
// processor's model number, and for processors younger than itself takes those of the oldest 64-bit
// ones: a third of the speed. It looks only when it is loaded.
//
// This restarts the program, once and before it has done anything, with kernels for what the
// processor can do (OPENBLAS_CORETYPE). Does nothing where OpenBLAS is not in the process or has
// chosen well, or where OPENBLAS_CORETYPE is set already. Calls AvoidTilesOfUnknownShape too. First
// thing in main(), with its argv.
void RestartWithFastBlas(char** argv);

// Some virtual machines announce AMX but not the shape of its tiles (CPUID leaf 0x1D is empty).
// oneDNN, with which libtorch computes in bfloat16, then uses tiles that it has not configured: an
// illegal instruction. Keeps it from AMX on such machines, by ONEDNN_MAX_CPU_ISA, unless that is
// set already. Before the first computation; changes the environment, so best while there is one
// thread. Once is enough.
void AvoidTilesOfUnknownShape();

namespace internal {

// What OPENBLAS_CORETYPE should be where OpenBLAS has chosen `chosen`; empty: leave it.
std::string BetterBlasKernels(const std::string& chosen, bool avx2, bool avx512);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_BLAS_KERNELS_H_
