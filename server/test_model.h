#ifndef CODISTILL_SERVER_TEST_MODEL_H_
#define CODISTILL_SERVER_TEST_MODEL_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "common/config/shard_map.h"
#include "proto/job.pb.h"
#include "proto/model.pb.h"
#include "proto/parameter_server.pb.h"

// For tests: a small model with every kind of tensor, and a job around it.
namespace codistill {

// w FLOAT [160, 128] (cut over shards), b FLOAT [128], mean FLOAT [128] and count INT64 [] as
// buffers, fixed FLOAT [3] frozen, and w2 tied to w.
TensorList TestTensors();

// Value of element `i` of tensor `name` in the files WriteTestModel writes.
float TestValue(const std::string& name, int64_t i);

// Group "alpha" of the model in `directory`, which WriteTestModel has filled: SGD with rate 0.5,
// batches of 4, 20 steps, a cut every 5.
JobConfig TestJob(const std::string& directory, int num_shards, int num_workers);

// alpha.safetensors and alpha.tensors.textproto, as the exporter writes them. False: not written.
bool WriteTestModel(const std::string& directory);

// Bytes of a safetensors file with the given FLOAT tensors.
std::string SafetensorsBytes(
    const std::vector<std::pair<std::string, std::vector<float>>>& tensors);

// The same of all tensors of a list with storage, all FLOAT, in their shapes.
std::string SafetensorsBytes(const TensorList& tensors,
                             const std::function<float(int tensor, int64_t i)>& value);

}  // namespace codistill

#endif  // CODISTILL_SERVER_TEST_MODEL_H_
