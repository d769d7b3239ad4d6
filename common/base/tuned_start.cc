#include "common/base/tuned_start.h"

#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <iterator>

#include "common/base/blas_kernels.h"

namespace codistill {
namespace {

constexpr char kTunables[] = "GLIBC_TUNABLES";

// Whether the environment has changed.
bool AskForHugePages() {
#if defined(__GLIBC__)
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  const std::string transparent{std::istreambuf_iterator<char>(file), {}};
  const char* const set = getenv(kTunables);
  const std::string wanted =
      internal::TunablesWithHugePages(set == nullptr ? "" : set, transparent);
  return !wanted.empty() && setenv(kTunables, wanted.c_str(), 1) == 0;
#else
  return false;
#endif
}

}  // namespace

namespace internal {

std::string TunablesWithHugePages(const std::string& tunables, const std::string& transparent) {
  if (transparent.find("[madvise]") == std::string::npos) return "";
  if (tunables.find("glibc.malloc.hugetlb") != std::string::npos) return "";
  return (tunables.empty() ? "" : tunables + ":") + "glibc.malloc.hugetlb=1";
}

}  // namespace internal

void RestartTuned(char** argv) {
  AvoidTilesOfUnknownShape();
  // Both, before one restart.
  const bool kernels = ChooseBlasKernels();
  const bool pages = AskForHugePages();
  if (!kernels && !pages) return;
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 1);
  if (size <= 0) return;
  path[size] = '\0';
  // The variables are set: whatever comes of it, once is enough.
  execv(path, argv);
}

}  // namespace codistill
