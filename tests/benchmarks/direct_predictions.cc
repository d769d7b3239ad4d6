// The baseline of `prediction`: an archive and nothing but libtorch around it, its forward pass in
// a loop over inputs that are there already.
//
//   direct_predictions ARCHIVE INPUTS SHAPE OUTPUTS OPTIMIZE
//
// INPUTS is a file of floats, whole examples of SHAPE ("3,32,32"); their logits are written to
// OUTPUTS. OPTIMIZE 1 leaves the JIT's graph optimisation on; 2 has libtorch compile the archive
// for inference besides (torch::jit::optimize_for_inference). Then, for each line "ROWS PASSES" on
// stdin, runs so many passes over so many examples each and answers with one line of JSON: seconds
// in all, and those of each pass.

#include <malloc.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "common/base/tuned_start.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class DirectLoop {
 public:
  DirectLoop(const std::string& archive, const std::string& inputs, const std::string& shape,
             bool compile)
      : module_(torch::jit::load(archive)) {
    module_.eval();
    if (compile) {
      torch::NoGradGuard no_grad;
      module_ = torch::jit::optimize_for_inference(module_);
    }
    std::vector<int64_t> sizes = {-1};
    std::stringstream text(shape);
    for (std::string size; std::getline(text, size, ',');) sizes.push_back(std::stoll(size));
    std::ifstream in(inputs, std::ios::binary);
    std::stringstream bytes;
    bytes << in.rdbuf();
    bytes_ = bytes.str();
    const auto elements = static_cast<int64_t>(bytes_.size() / sizeof(float));
    examples_ = torch::from_blob(bytes_.data(), {elements}, at::kFloat).clone().reshape(sizes);
  }

  void WriteOutputs(const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    for (const at::Tensor& batch : examples_.split(64)) {
      const at::Tensor logits = Forward(batch).contiguous();
      out.write(static_cast<const char*>(logits.data_ptr()), logits.nbytes());
    }
  }

  // Seconds of each pass.
  std::vector<double> Run(int64_t rows, int passes) {
    std::vector<at::Tensor>& batches = batches_[rows];
    if (batches.empty()) {
      for (const at::Tensor& batch : examples_.split(rows)) {
        if (batch.size(0) == rows) batches.push_back(batch.clone());
      }
    }
    std::vector<double> seconds;
    for (int i = 0; i < passes; ++i) {
      const double start = Now();
      Forward(batches[i % batches.size()]);
      seconds.push_back(Now() - start);
    }
    return seconds;
  }

 private:
  at::Tensor Forward(const at::Tensor& batch) {
    torch::NoGradGuard no_grad;
    return module_.forward({batch}).toTensor();
  }

  torch::jit::Module module_;
  std::string bytes_;
  at::Tensor examples_;
  std::map<int64_t, std::vector<at::Tensor>> batches_;
};

int Main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: direct_predictions ARCHIVE INPUTS SHAPE OUTPUTS OPTIMIZE\n");
    return 2;
  }
  // As the product does: with malloc's defaults large tensors fault in anew on every call.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  at::set_num_threads(1);
  at::set_num_interop_threads(1);
  torch::jit::setGraphExecutorOptimize(std::atoi(argv[5]) != 0);
  DirectLoop loop(argv[1], argv[2], argv[3], std::atoi(argv[5]) == 2);
  loop.WriteOutputs(argv[4]);
  std::printf("{\"ready\": true}\n");
  std::fflush(stdout);

  int64_t rows = 0;
  int passes = 0;
  while (std::cin >> rows >> passes) {
    const double start = Now();
    const std::vector<double> each = loop.Run(rows, passes);
    const nlohmann::json answer = {{"seconds", Now() - start}, {"passes", each}};
    std::printf("%s\n", answer.dump().c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace codistill

int main(int argc, char** argv) {
  // As the product does, too.
  codistill::RestartTuned(argv);
  return codistill::Main(argc, argv);
}
