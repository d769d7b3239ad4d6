#include "common/base/blas_kernels.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

namespace codistill {
namespace {

constexpr char kVariable[] = "OPENBLAS_CORETYPE";

#if defined(__x86_64__)
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
bool HasAvx2() { return false; }
bool HasAvx512() { return false; }
#endif

}  // namespace

namespace internal {

std::string BetterBlasKernels(const std::string& chosen, bool avx2, bool avx512) {
  // All that it has from before AVX.
  for (const char* old : {"Prescott", "Core2", "Penryn", "Dunnington", "Nehalem", "Katmai",
                          "Coppermine", "Northwood", "Banias", "Atom"}) {
    if (chosen == old) return avx512 ? "SkylakeX" : avx2 ? "Haswell" : "";
  }
  return "";
}

}  // namespace internal

void RestartWithFastBlas(char** argv) {
  if (getenv(kVariable) != nullptr) return;
  using CoreName = char*();
  auto* const core_name = reinterpret_cast<CoreName*>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  if (core_name == nullptr) return;
  const std::string better = internal::BetterBlasKernels(core_name(), HasAvx2(), HasAvx512());
  if (better.empty()) return;
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (size <= 0) return;
  path[size] = '\0';
  // Whatever comes of it, once is enough.
  setenv(kVariable, better.c_str(), 1);
  execv(path, argv);
}

}  // namespace codistill
