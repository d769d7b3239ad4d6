#include "server/test_model.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/base/file.h"
#include "common/tensor/tensor.h"
#include "google/protobuf/text_format.h"

namespace codistill {
namespace {

std::string File(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
  return bytes + header + data;
}

}  // namespace

TensorList TestTensors() {
  TensorList list;
  google::protobuf::TextFormat::ParseFromString(
      R"pb(tensors { name: "w" shape: 160 shape: 128 dtype: DT_FLOAT role: PARAMETER }
           tensors { name: "b" shape: 128 dtype: DT_FLOAT role: PARAMETER }
           tensors { name: "w2" shape: 160 shape: 128 dtype: DT_FLOAT role: TIED tied_to: "w" }
           tensors { name: "fixed" shape: 3 dtype: DT_FLOAT role: FROZEN }
           tensors { name: "mean" shape: 128 dtype: DT_FLOAT role: BUFFER }
           tensors { name: "count" dtype: DT_INT64 role: BUFFER })pb",
      &list);
  return list;
}

float TestValue(const std::string& name, int64_t i) {
  return static_cast<float>(name[0]) + 0.001f * static_cast<float>(i);
}

JobConfig TestJob(const std::string& directory, int num_shards, int num_workers) {
  JobConfig job;
  google::protobuf::TextFormat::ParseFromString(
      absl::StrCat(R"pb(name: "test"
                        run_id: "run-7"
                        groups { name: "alpha" }
                        training {
                          batch_size: 4
                          publish_every_steps: 5
                          log_every_steps: 2
                          rejoin_timeout_s: 60
                          optimizer { kind: SGD learning_rate: 0.5 }
                        }
                        stop { steps: 20 })pb"),
      &job);
  job.mutable_groups(0)->set_num_shards(num_shards);
  job.mutable_groups(0)->set_num_workers(num_workers);
  job.mutable_model()->set_archive_dir(directory);
  return job;
}

bool WriteTestModel(const std::string& directory) {
  std::vector<std::string> entries;
  std::string data;
  const TensorList list = TestTensors();
  for (const TensorSpec& spec : list.tensors()) {
    if (spec.role() == TensorSpec::TIED) continue;
    const std::vector<int64_t> shape(spec.shape().begin(), spec.shape().end());
    const size_t begin = data.size();
    for (int64_t i = 0; i < ElementCount(shape); ++i) {
      if (spec.dtype() == DT_INT64) {
        const int64_t value = 5;
        data.append(reinterpret_cast<const char*>(&value), sizeof(value));
      } else {
        const float value = TestValue(spec.name(), i);
        data.append(reinterpret_cast<const char*>(&value), sizeof(value));
      }
    }
    entries.push_back(absl::StrCat("\"", spec.name(), "\":{\"dtype\":\"",
                                   spec.dtype() == DT_INT64 ? "I64" : "F32", "\",\"shape\":[",
                                   absl::StrJoin(shape, ","), "],\"data_offsets\":[", begin, ",",
                                   data.size(), "]}"));
  }
  std::string text;
  google::protobuf::TextFormat::PrintToString(list, &text);
  return FileSystem::Real()->MakeDirs(directory).ok() &&
         WriteFileAtomically(JoinPath(directory, "alpha.safetensors"),
                             File(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data))
             .ok() &&
         WriteFileAtomically(JoinPath(directory, "alpha.tensors.textproto"), text).ok();
}

std::string SafetensorsBytes(
    const std::vector<std::pair<std::string, std::vector<float>>>& tensors) {
  std::vector<std::string> entries;
  std::string data;
  for (const auto& tensor : tensors) {
    const size_t begin = data.size();
    data.append(reinterpret_cast<const char*>(tensor.second.data()),
                tensor.second.size() * sizeof(float));
    entries.push_back(absl::StrCat("\"", tensor.first, "\":{\"dtype\":\"F32\",\"shape\":[",
                                   tensor.second.size(), "],\"data_offsets\":[", begin, ",",
                                   data.size(), "]}"));
  }
  return File(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data);
}

std::string SafetensorsBytes(const TensorList& tensors,
                             const std::function<float(int tensor, int64_t i)>& value) {
  std::vector<std::string> entries;
  std::string data;
  for (int t = 0; t < tensors.tensors_size(); ++t) {
    const TensorSpec& spec = tensors.tensors(t);
    if (spec.role() == TensorSpec::TIED) continue;
    const size_t begin = data.size();
    int64_t elements = 1;
    for (const int64_t dimension : spec.shape()) elements *= dimension;
    data.resize(begin + elements * sizeof(float));
    for (int64_t i = 0; i < elements; ++i) {
      const float element = value(t, i);
      std::memcpy(&data[begin + i * sizeof(float)], &element, sizeof(element));
    }
    entries.push_back(absl::StrCat("\"", spec.name(), "\":{\"dtype\":\"F32\",\"shape\":[",
                                   absl::StrJoin(spec.shape(), ","), "],\"data_offsets\":[", begin,
                                   ",", data.size(), "]}"));
  }
  return File(absl::StrCat("{", absl::StrJoin(entries, ","), "}"), data);
}

}  // namespace codistill
