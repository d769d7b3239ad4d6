#include "common/model/module_tensors.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/model/torch_support.h"

namespace codistill::internal {
namespace {

// The submodule that holds "a.b.weight" as its attribute "weight".
std::pair<torch::jit::Module, std::string> FindOwner(torch::jit::Module module,
                                                     const std::string& name) {
  std::vector<std::string> parts = absl::StrSplit(name, '.');
  for (size_t i = 0; i + 1 < parts.size(); ++i) module = module.attr(parts[i]).toModule();
  return {module, parts.back()};
}

}  // namespace

absl::StatusOr<ModuleTensors> ModuleTensors::Collect(const torch::jit::Module& module) {
  struct Named {
    std::string name;
    at::Tensor tensor;
    bool is_parameter;
  };
  std::vector<Named> all;
  for (const auto& item : module.named_parameters()) all.push_back({item.name, item.value, true});
  for (const auto& item : module.named_buffers()) all.push_back({item.name, item.value, false});

  ModuleTensors result;
  std::map<const void*, int> owners;  // storage -> index of its first tensor
  for (const Named& item : all) {
    const int index = static_cast<int>(result.slots_.size());
    if (item.tensor.layout() != at::kStrided) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", item.name, " is not dense; only dense tensors can be trained"));
    }
    const DataType dtype = FromTorchType(item.tensor.scalar_type());
    if (dtype == DT_INVALID) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", item.name, " is ",
                                                     c10::toString(item.tensor.scalar_type()),
                                                     ", a type that cannot be stored"));
    }
    const bool trained = item.is_parameter && item.tensor.requires_grad();
    if (trained && dtype != DT_FLOAT) {
      return absl::InvalidArgumentError(absl::StrCat("parameter ", item.name, " is ",
                                                     DataTypeName(dtype),
                                                     "; a trained parameter must be FP32"));
    }

    TensorSpec* spec = result.list_.add_tensors();
    spec->set_name(item.name);
    for (int64_t size : item.tensor.sizes()) spec->add_shape(size);
    spec->set_dtype(dtype);
    spec->set_role(trained             ? TensorSpec::PARAMETER
                   : item.is_parameter ? TensorSpec::FROZEN
                                       : TensorSpec::BUFFER);

    auto [owner, attribute] = FindOwner(module, item.name);
    at::Tensor tensor = item.tensor;
    const void* storage = tensor.numel() == 0 ? nullptr : tensor.storage().data();
    const auto tied = owners.find(storage);
    if (storage != nullptr && tied != owners.end()) {
      const at::Tensor& first = all[tied->second].tensor;
      if (first.data_ptr() != tensor.data_ptr() || first.sizes() != tensor.sizes() ||
          first.strides() != tensor.strides()) {
        return absl::InvalidArgumentError(
            absl::StrCat("tensors ", all[tied->second].name, " and ", item.name,
                         " share memory but are not the same tensor; tie whole tensors or none"));
      }
      spec->set_role(TensorSpec::TIED);
      spec->set_tied_to(all[tied->second].name);
      tensor = result.slots_[tied->second].tensor;
      owner.setattr(attribute, tensor);
    } else {
      if (storage != nullptr) owners[storage] = index;
      if (!tensor.is_contiguous()) {
        tensor = tensor.detach().contiguous().requires_grad_(tensor.requires_grad());
        owner.setattr(attribute, tensor);
      }
    }

    TensorView view;
    view.name = item.name;
    view.dtype = dtype;
    view.shape = tensor.sizes().vec();
    view.data = tensor.data_ptr();
    result.views_.push_back(std::move(view));
    result.slots_.push_back({owner, attribute, tensor, static_cast<int64_t>(tensor._version())});
  }
  return result;
}

void ModuleTensors::AddSet() {
  sets_.resize(2);
  for (size_t i = 0; i < slots_.size(); ++i) {
    // Tied tensors are one object in all their slots, and of one memory in every set.
    size_t first = 0;
    while (!slots_[first].tensor.is_same(slots_[i].tensor)) ++first;
    const at::Tensor own = slots_[i].tensor.detach();
    sets_[0].data.push_back(own);
    sets_[1].data.push_back(first < i ? sets_[1].data[first] : own.clone());
  }
  for (Set& set : sets_) {
    set.views = views_;
    for (size_t i = 0; i < slots_.size(); ++i) set.views[i].data = set.data[i].data_ptr();
  }
}

void ModuleTensors::Use(int set) {
  if (set == set_ || sets_.empty()) return;
  set_ = set;
  for (size_t i = 0; i < slots_.size(); ++i) {
    at::Tensor tensor = slots_[i].tensor;
    if (tensor.data_ptr() == sets_[set].data[i].data_ptr()) continue;  // a tied one, done already
    tensor.set_data(sets_[set].data[i]);
  }
}

void ModuleTensors::Move(int set, int index, const at::Tensor& data, void* host) {
  const at::Tensor own = slots_[index].tensor;
  for (size_t i = index; i < slots_.size(); ++i) {
    if (!slots_[i].tensor.is_same(own)) continue;
    if (sets_.empty()) {
      views_[i].data = host;
    } else {
      sets_[set].data[i] = data;
      sets_[set].views[i].data = host;
    }
  }
  if (set == set_) own.set_data(data);
}

absl::Status ModuleTensors::PutBuffersBack() {
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (list_.tensors(i).role() != TensorSpec::BUFFER) continue;
    Slot& slot = slots_[i];
    const at::Tensor now = slot.owner.attr(slot.attribute).toTensor();
    if (now.is_same(slot.tensor)) continue;
    if (now.sizes() != slot.tensor.sizes() || now.scalar_type() != slot.tensor.scalar_type()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "forward() changed buffer ", list_.tensors(i).name(), " from ",
          c10::toString(slot.tensor.scalar_type()), " ", ShapeString(slot.tensor.sizes().vec()),
          " to ", c10::toString(now.scalar_type()), " ", ShapeString(now.sizes().vec()),
          "; its shape and type must stay"));
    }
    torch::NoGradGuard no_grad;
    slot.tensor.copy_(now);
    slot.owner.setattr(slot.attribute, slot.tensor);
  }
  return absl::OkStatus();
}

absl::Status ModuleTensors::View(const ModuleTensors& other) {
  if (list_.SerializeAsString() != other.list_.SerializeAsString()) {
    return absl::FailedPreconditionError("its tensors are not those it had when it was loaded");
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.tensor = other.slots_[i].tensor.detach();
    slot.owner.setattr(slot.attribute, slot.tensor);
    slot.first_version = static_cast<int64_t>(slot.tensor._version());
    views_[i].data = slot.tensor.data_ptr();
  }
  return absl::OkStatus();
}

std::string ModuleTensors::FirstChanged() const {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (!slot.owner.attr(slot.attribute).toTensor().is_same(slot.tensor) ||
        static_cast<int64_t>(slot.tensor._version()) != slot.first_version) {
      return list_.tensors(i).name();
    }
  }
  return "";
}

}  // namespace codistill::internal
