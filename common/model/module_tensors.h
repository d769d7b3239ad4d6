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
  // Of the set in use.
  const std::vector<TensorView>& views() const {
    return sets_.empty() ? views_ : sets_[set_].views;
  }
  const at::Tensor& tensor(int index) const { return slots_[index].tensor; }

  // Makes a second set of all tensors, with the same values. Once.
  void AddSet();
  int sets() const { return sets_.empty() ? 1 : static_cast<int>(sets_.size()); }
  const std::vector<TensorView>& views(int set) const {
    return sets_.empty() ? views_ : sets_[set].views;
  }
  // The module's tensors, which stay the same objects, with their gradients' accumulators, take
  // their data from this set.
  void Use(int set);

  // Tensor `index` of a set lives in `data` from now on, on whatever device, whose values it has,
  // and is viewed at `host`; the tensors tied to it with it.
  void Move(int set, int index, const at::Tensor& data, void* host);
  // Where it lives.
  at::Tensor data(int set, int index) const {
    return sets_.empty() ? slots_[index].tensor.detach() : sets_[set].data[index];
  }

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

  struct Set {
    std::vector<at::Tensor> data;  // by slot; detached
    std::vector<TensorView> views;
  };

  TensorList list_;
  std::vector<TensorView> views_;
  std::vector<Slot> slots_;
  std::vector<Set> sets_;  // empty as long as there is one
  int set_ = 0;            // in use
};

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_MODULE_TENSORS_H_
