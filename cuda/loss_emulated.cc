// The CUDA loss on the processor, for tests.

#include "cuda/elementwise_loss.cu"
#include "cuda/loss.cu"
#include "cuda/loss_sums.cu"
#include "cuda/softmax_loss_bfloat16.cu"
#include "cuda/softmax_loss_float32.cu"
