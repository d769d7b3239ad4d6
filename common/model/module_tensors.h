#ifndef CODISTILL_COMMON_MODEL_MODULE_TENSORS_H_
#define CODISTILL_COMMON_MODEL_MODULE_TENSORS_H_

#include <torch/script.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"
#include "proto/model.pb.h"

namespace codistill::internal {

// The tensors of a scripted module: what they are and where they live. For .cc files of
// common/model only. Not thread-safe.
class ModuleTensors {
 public:
  // Lists parameters, then buffers, with the rules of models/export.py. Afterwards every tensor of
  // the module is contiguous and lives at a fixed place, and tensors that are tied are one tensor,
  // so that autograd adds up their gradients. INVALID_ARGUMENT names a tensor that cannot be
  // trained.
  static absl::StatusOr<ModuleTensors> Collect(const torch::jit::Module& module);

  const TensorList& list() const { return list_; }
  const std::vector<TensorView>& views() const { return views_; }
  const at::Tensor& tensor(int index) const { return slots_[index].tensor; }

  // A script may assign a new tensor to a buffer instead of writing into the old one. Copies such
  // values to the buffer's place and puts the old tensor back. FAILED_PRECONDITION if a shape or
  // dtype changed.
  absl::Status PutBuffersBack();

  // Puts the tensors of `other` in the places of ours, without gradients. FAILED_PRECONDITION if
  // the two modules do not have the same tensors.
  absl::Status View(const ModuleTensors& other);

  // Name of a tensor that was written or replaced since this object was made; empty if none was.
  std::string FirstChanged() const;

 private:
  struct Slot {
    torch::jit::Module owner;
    std::string attribute;
    at::Tensor tensor;
    int64_t first_version = 0;
  };

  TensorList list_;
  std::vector<TensorView> views_;
  std::vector<Slot> slots_;
};

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_MODULE_TENSORS_H_
