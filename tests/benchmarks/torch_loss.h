#ifndef CODISTILL_TESTS_BENCHMARKS_TORCH_LOSS_H_
#define CODISTILL_TESTS_BENCHMARKS_TORCH_LOSS_H_

#include <cstdint>

// The codistillation loss as one writes it in libtorch: the baseline of the loss benchmark. A
// header without torch, which is slow to compile.
namespace codistill {

struct TorchLossInputs {
  int64_t rows = 0, classes = 0;
  const float* logits = nullptr;
  const int64_t* labels = nullptr;
  const float* teacher = nullptr;  // [rows, classes]
  bool probabilities = true;       // what the teacher gives; else logits
  double temperature = 1;
};

// Threads of one operation, from the next call on.
void SetTorchThreads(int threads);

// Mean over rows of the cross-entropy with the labels and T^2 times that with the teacher, by
// autograd over `chunk` rows at a time; returns the loss. The gradient with respect to the logits
// is gathered in `gradient`, [rows, classes]; null: it stays where autograd put it.
double TorchLoss(const TorchLossInputs& inputs, int64_t chunk, float* gradient);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BENCHMARKS_TORCH_LOSS_H_
