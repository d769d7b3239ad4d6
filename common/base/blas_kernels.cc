#include "common/base/blas_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <dlfcn.h>
#include <stdlib.h>

namespace codistill {
namespace {

constexpr char kVariable[] = "OPENBLAS_CORETYPE";

#if defined(__x86_64__)
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool HasTilesOfUnknownShape() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kAmxTile) == 0) return false;
  // EAX: the largest palette, of which 0 is the one without tiles.
  return __get_cpuid_count(0x1d, 0, &a, &b, &c, &d) == 0 || a == 0;
}
#else
bool HasTilesOfUnknownShape() { return false; }
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

void AvoidTilesOfUnknownShape() {
  // The older name of the variable counts as well.
  if (getenv("DNNL_MAX_CPU_ISA") != nullptr || !HasTilesOfUnknownShape()) return;
  setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", /*overwrite=*/0);
}

bool ChooseBlasKernels() {
  if (getenv(kVariable) != nullptr) return false;
  using CoreName = char*();
  auto* const core_name = reinterpret_cast<CoreName*>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  if (core_name == nullptr) return false;
  const std::string better = internal::BetterBlasKernels(core_name(), HasAvx2(), HasAvx512());
  return !better.empty() && setenv(kVariable, better.c_str(), 1) == 0;
}

}  // namespace codistill
