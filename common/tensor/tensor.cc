#include "common/tensor/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "glog/logging.h"

namespace codistill {
namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest vector

struct DataTypeInfo {
  DataType dtype;
  size_t size;
  absl::string_view name;
};

constexpr DataTypeInfo kDataTypes[] = {
    {DT_FLOAT, 4, "FP32"},    {DT_DOUBLE, 8, "FP64"}, {DT_HALF, 2, "FP16"},
    {DT_BFLOAT16, 2, "BF16"}, {DT_INT32, 4, "INT32"}, {DT_INT64, 8, "INT64"},
    {DT_UINT8, 1, "UINT8"},   {DT_BOOL, 1, "BOOL"},   {DT_INT8, 1, "INT8"},
};

// Whether elements of `dtype` may be looked at as T. The two 16-bit floats have no C++ type here:
// their bits are seen as uint16_t.
template <typename T>
bool Holds(DataType dtype) {
  if (std::is_same<T, float>::value) return dtype == DT_FLOAT;
  if (std::is_same<T, double>::value) return dtype == DT_DOUBLE;
  if (std::is_same<T, uint16_t>::value) return dtype == DT_HALF || dtype == DT_BFLOAT16;
  if (std::is_same<T, int32_t>::value) return dtype == DT_INT32;
  if (std::is_same<T, int64_t>::value) return dtype == DT_INT64;
  if (std::is_same<T, uint8_t>::value) return dtype == DT_UINT8;
  if (std::is_same<T, int8_t>::value) return dtype == DT_INT8;
  if (std::is_same<T, bool>::value) return dtype == DT_BOOL;
  return false;
}

}  // namespace

size_t ElementSize(DataType dtype) {
  for (const DataTypeInfo& info : kDataTypes) {
    if (info.dtype == dtype) return info.size;
  }
  return 0;
}

absl::string_view DataTypeName(DataType dtype) {
  for (const DataTypeInfo& info : kDataTypes) {
    if (info.dtype == dtype) return info.name;
  }
  return "INVALID";
}

DataType DataTypeFromName(absl::string_view name) {
  for (const DataTypeInfo& info : kDataTypes) {
    if (info.name == name) return info.dtype;
  }
  return DT_INVALID;
}

int64_t ElementCount(absl::Span<const int64_t> shape) {
  // A dimension of 0 makes the product 0 whatever the others are, but a bad one is still bad.
  int64_t count = 1;
  bool overflow = false, zero = false;
  for (const int64_t dimension : shape) {
    if (dimension < 0) return -1;
    if (dimension == 0) {
      zero = true;
    } else if (count > std::numeric_limits<int64_t>::max() / dimension) {
      overflow = true;
    } else {
      count *= dimension;
    }
  }
  if (zero) return 0;
  return overflow ? -1 : count;
}

std::string ShapeString(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

Tensor Tensor::Allocate(DataType dtype, std::vector<int64_t> shape) {
  const int64_t elements = ElementCount(shape);
  const size_t size = ElementSize(dtype);
  CHECK_GE(elements, 0) << "shape " << ShapeString(shape);
  CHECK_GT(size, 0u) << "data type " << static_cast<int>(dtype);
  CHECK_LE(static_cast<uint64_t>(elements),
           (std::numeric_limits<size_t>::max() - kAlignment) / size)
      << "shape " << ShapeString(shape);
  const size_t bytes = static_cast<size_t>(elements) * size;
  // Whole cache lines, at least one: a tensor without elements still has an address.
  const size_t capacity = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  void* data = std::aligned_alloc(kAlignment, capacity);
  CHECK(data != nullptr) << "out of memory for " << capacity << " bytes";
  return Adopt(dtype, std::move(shape), data, std::shared_ptr<const void>(data, [](const void* p) {
                 std::free(const_cast<void*>(p));
               }));
}

Tensor Tensor::Zeros(DataType dtype, std::vector<int64_t> shape) {
  Tensor tensor = Allocate(dtype, std::move(shape));
  std::memset(tensor.data(), 0, tensor.bytes());
  return tensor;
}

Tensor Tensor::Adopt(DataType dtype, std::vector<int64_t> shape, void* data,
                     std::shared_ptr<const void> owner, int device) {
  Tensor tensor;
  tensor.device_ = device;
  tensor.dtype_ = dtype;
  tensor.shape_ = std::move(shape);
  tensor.data_ = data;
  tensor.owner_ = std::move(owner);
  return tensor;
}

template <typename T>
absl::Span<T> Tensor::As() {
  CHECK(Holds<T>(dtype_)) << "elements are " << DataTypeName(dtype_);
  CHECK_EQ(device_, kHostDevice) << "the tensor is on " << DeviceName(device_);
  return absl::Span<T>(static_cast<T*>(data_), static_cast<size_t>(elements()));
}

template <typename T>
absl::Span<const T> Tensor::As() const {
  CHECK(Holds<T>(dtype_)) << "elements are " << DataTypeName(dtype_);
  CHECK_EQ(device_, kHostDevice) << "the tensor is on " << DeviceName(device_);
  return absl::Span<const T>(static_cast<const T*>(data_), static_cast<size_t>(elements()));
}

#define CODISTILL_INSTANTIATE(T)          \
  template absl::Span<T> Tensor::As<T>(); \
  template absl::Span<const T> Tensor::As<T>() const
CODISTILL_INSTANTIATE(float);
CODISTILL_INSTANTIATE(double);
CODISTILL_INSTANTIATE(uint16_t);
CODISTILL_INSTANTIATE(int32_t);
CODISTILL_INSTANTIATE(int64_t);
CODISTILL_INSTANTIATE(uint8_t);
CODISTILL_INSTANTIATE(int8_t);
CODISTILL_INSTANTIATE(bool);
#undef CODISTILL_INSTANTIATE

}  // namespace codistill
