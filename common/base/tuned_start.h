#ifndef CODISTILL_COMMON_BASE_TUNED_START_H_
#define CODISTILL_COMMON_BASE_TUNED_START_H_

#include <string>

namespace codistill {

// For programs that compute with libtorch: restarts the program, once and before it has done
// anything, where libraries that look at the environment only when they are loaded would be faster
// with another one:
//   - OPENBLAS_CORETYPE: kernels for what the processor can do (ChooseBlasKernels);
//   - GLIBC_TUNABLES: glibc.malloc.hugetlb=1, so that malloc asks for huge pages for its heap. It
//     has effect where the kernel gives them on demand (transparent_hugepage: madvise), and saves
//     a few percent of a convolutional network's time.
// Variables that say something of these already stay as they are. Calls AvoidTilesOfUnknownShape
// too. First thing in main(), with its argv.
void RestartTuned(char** argv);

namespace internal {

// What GLIBC_TUNABLES should be instead of `tunables`; empty: leave it. `transparent`: content of
// /sys/kernel/mm/transparent_hugepage/enabled.
std::string TunablesWithHugePages(const std::string& tunables, const std::string& transparent);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_TUNED_START_H_
