// A function on a stack of its own that runs until it lets the caller go on. For tests.

#ifndef CODISTILL_CUDA_TESTING_FIBRE_H_
#define CODISTILL_CUDA_TESTING_FIBRE_H_

#include <ucontext.h>

#include <cstddef>

namespace codistill::emulated {

// Memory for a fibre, with a page below that must not be touched.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(Stack&& other) noexcept;
  Stack(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  static size_t size();

 private:
  char* bottom_;
};

// Not for several threads: Enter() is always called from the same one.
class Fibre {
 public:
  // Prepares to run `body` on `stack` at the first Enter(). A fibre that was left may be started
  // anew, without its destructors being run.
  void Start(Stack* stack, void (*body)());
  // Runs until Leave(), or the end of `body`.
  void Enter();
  // From within.
  void Leave();

 private:
  static void Main();

  Stack* stack_ = nullptr;
  void (*body_)() = nullptr;
#if defined(__x86_64__)
  void* own_ = nullptr;  // stack pointers of who does not run
  void* caller_ = nullptr;
#else
  ucontext_t own_, caller_;
#endif
  // For AddressSanitizer.
  void* own_fake_ = nullptr;
  void* caller_fake_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace codistill::emulated

#endif  // CODISTILL_CUDA_TESTING_FIBRE_H_
