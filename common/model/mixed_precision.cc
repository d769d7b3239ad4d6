#include "common/model/mixed_precision.h"

#include <ATen/autocast_mode.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <torch/version.h>

namespace codistill::internal {
namespace {

#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4)

bool Enabled(at::DeviceType type) { return at::autocast::is_autocast_enabled(type); }
void SetEnabled(at::DeviceType type, bool enabled) {
  at::autocast::set_autocast_enabled(type, enabled);
}
at::ScalarType Dtype(at::DeviceType type) { return at::autocast::get_autocast_dtype(type); }
void SetDtype(at::DeviceType type, at::ScalarType dtype) {
  at::autocast::set_autocast_dtype(type, dtype);
}

#else  // one set of functions for CUDA and one for CPUs

bool Enabled(at::DeviceType type) {
  return type == at::kCPU ? at::autocast::is_cpu_enabled() : at::autocast::is_enabled();
}
void SetEnabled(at::DeviceType type, bool enabled) {
  if (type == at::kCPU) {
    at::autocast::set_cpu_enabled(enabled);
  } else {
    at::autocast::set_enabled(enabled);
  }
}
at::ScalarType Dtype(at::DeviceType type) {
  return type == at::kCPU ? at::autocast::get_autocast_cpu_dtype()
                          : at::autocast::get_autocast_gpu_dtype();
}
void SetDtype(at::DeviceType type, at::ScalarType dtype) {
  if (type == at::kCPU) {
    at::autocast::set_autocast_cpu_dtype(dtype);
  } else {
    at::autocast::set_autocast_gpu_dtype(dtype);
  }
}

#endif

}  // namespace

MixedPrecision::MixedPrecision(Precision precision, at::DeviceType type)
    : on_(precision == BF16), type_(type) {
  if (!on_) return;
  was_enabled_ = Enabled(type_);
  was_dtype_ = Dtype(type_);
  at::autocast::increment_nesting();
  SetDtype(type_, at::kBFloat16);
  SetEnabled(type_, true);
}

MixedPrecision::~MixedPrecision() {
  if (!on_) return;
  SetEnabled(type_, was_enabled_);
  SetDtype(type_, was_dtype_);
  at::autocast::decrement_nesting();
  at::autocast::clear_cache();
}

void AvoidBrokenBfloat16Kernels() {
  static const bool done = [] {
    if (getenv("ONEDNN_MAX_CPU_ISA") != nullptr || getenv("DNNL_MAX_CPU_ISA") != nullptr) {
      return true;
    }
    // As dnnl_types.h of version 2 declares them. libtorch of its own makers has oneDNN inside,
    // version 3 by now, which works and is not found here.
    struct DnnlVersion {
      int major;
    };
    using VersionFunction = const DnnlVersion*();
    using SetMaxIsa = int(int);
    constexpr int kAvx512CoreBf16 = 0xe7;
    auto* version = reinterpret_cast<VersionFunction*>(dlsym(RTLD_DEFAULT, "dnnl_version"));
    auto* set_max = reinterpret_cast<SetMaxIsa*>(dlsym(RTLD_DEFAULT, "dnnl_set_max_cpu_isa"));
    if (version != nullptr && set_max != nullptr && version()->major == 2) set_max(kAvx512CoreBf16);
    return true;
  }();
  static_cast<void>(done);
}

}  // namespace codistill::internal
