#include "common/model/mixed_precision.h"

#include <ATen/autocast_mode.h>
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

}  // namespace codistill::internal
