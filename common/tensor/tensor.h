#ifndef CODISTILL_COMMON_TENSOR_TENSOR_H_
#define CODISTILL_COMMON_TENSOR_TENSOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "common/base/device.h"
#include "proto/model.pb.h"

namespace codistill {

// Bytes of one element; 0 for DT_INVALID.
size_t ElementSize(DataType dtype);

// "FP32", "INT64", ...: the Open Inference Protocol's names. An unknown name gives DT_INVALID.
absl::string_view DataTypeName(DataType dtype);
DataType DataTypeFromName(absl::string_view name);

// Product of the dimensions; 1 for a scalar. Negative dimensions or an overflow give -1.
int64_t ElementCount(absl::Span<const int64_t> shape);

// "[32, 128]".
std::string ShapeString(absl::Span<const int64_t> shape);

// A tensor in memory that somebody else owns: where a model keeps a parameter. Row-major,
// contiguous, little-endian. Copying the view copies no data.
struct TensorView {
  std::string name;
  DataType dtype = DT_INVALID;
  std::vector<int64_t> shape;
  void* data = nullptr;

  int64_t elements() const { return ElementCount(shape); }
  size_t bytes() const { return static_cast<size_t>(elements()) * ElementSize(dtype); }
};

// A tensor in memory with shared ownership of its (64-byte aligned, unless adopted) bytes. Copies
// share the data. Thread-safe as far as its bytes are not written. The memory is the host's, unless
// whoever adopts it says otherwise: then only code for that device may look into it.
class Tensor {
 public:
  Tensor() = default;

  // Uninitialised / zero-filled. `shape` must be valid (ElementCount >= 0).
  static Tensor Allocate(DataType dtype, std::vector<int64_t> shape);
  static Tensor Zeros(DataType dtype, std::vector<int64_t> shape);

  // Shares memory that `owner` keeps alive.
  static Tensor Adopt(DataType dtype, std::vector<int64_t> shape, void* data,
                      std::shared_ptr<const void> owner, int device = kHostDevice);

  bool empty() const { return data_ == nullptr; }
  DataType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t elements() const { return ElementCount(shape_); }
  size_t bytes() const { return static_cast<size_t>(elements()) * ElementSize(dtype_); }
  int device() const { return device_; }  // common/base/device.h
  void* data() { return data_; }
  const void* data() const { return data_; }
  // Keeps the bytes alive, e.g. behind a gRPC slice.
  const std::shared_ptr<const void>& owner() const { return owner_; }

  // Typed access to host memory; T must match dtype() (both CHECKed).
  template <typename T>
  absl::Span<T> As();
  template <typename T>
  absl::Span<const T> As() const;

 private:
  DataType dtype_ = DT_INVALID;
  std::vector<int64_t> shape_;
  void* data_ = nullptr;
  int device_ = kHostDevice;
  std::shared_ptr<const void> owner_;
};

// A tensor with the name it has in a job, a model or a request.
struct NamedTensor {
  std::string name;
  Tensor tensor;
};

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_TENSOR_H_
