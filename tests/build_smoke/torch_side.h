// The half of libraries_test that includes libtorch, whose macros clash with glog's.
#ifndef CODISTILL_TESTS_BUILD_SMOKE_TORCH_SIDE_H_
#define CODISTILL_TESTS_BUILD_SMOKE_TORCH_SIDE_H_

namespace codistill {

// d/dx x^2 by autograd.
float GradientOfSquare(float x);

// Multiplies two n x n matrices of ones, which goes through BLAS, and returns the largest distance
// of an element from n.
double LargestBlasError(int n);

}  // namespace codistill

#endif  // CODISTILL_TESTS_BUILD_SMOKE_TORCH_SIDE_H_
