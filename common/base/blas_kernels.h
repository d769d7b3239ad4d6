#ifndef CODISTILL_COMMON_BASE_BLAS_KERNELS_H_
#define CODISTILL_COMMON_BASE_BLAS_KERNELS_H_

#include <string>

namespace codistill {

// OpenBLAS, which computes libtorch's matrix products on Debian, picks its kernels by the
// processor's model number, and for processors younger than itself takes those of the oldest 64-bit
// ones: a third of the speed. It looks only when it is loaded.
//
// This sets OPENBLAS_CORETYPE to kernels for what the processor can do, and says whether it has:
// the program must be restarted then (RestartTuned). Does nothing where OpenBLAS is not in the
// process or has chosen well, or where the variable is set already. Changes the environment, so
// only while there is one thread.
bool ChooseBlasKernels();

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
