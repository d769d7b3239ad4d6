#include "cuda/testing/fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define CODISTILL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CODISTILL_ASAN 1
#endif
#endif

#ifdef CODISTILL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a function must leave as it was, stores the stack pointer and goes on with another.
// (swapcontext would ask the kernel for the signal mask every time.)
extern "C" void CodistillSwitchStack(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl CodistillSwitchStack
.type CodistillSwitchStack, @function
CodistillSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size CodistillSwitchStack, .-CodistillSwitchStack
)");
#endif

namespace codistill::emulated {
namespace {

constexpr size_t kGuard = 4096;
Fibre* entered = nullptr;

}  // namespace

size_t Stack::size() {
#ifdef CODISTILL_ASAN
  return 256 << 10;
#else
  return 64 << 10;
#endif
}

Stack::Stack() {
  void* const memory = mmap(nullptr, kGuard + size(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
    perror("memory for a fibre");
    abort();
  }
  bottom_ = static_cast<char*>(memory) + kGuard;
}

Stack::~Stack() {
  if (bottom_ != nullptr) munmap(bottom_ - kGuard, kGuard + size());
}

Stack::Stack(Stack&& other) noexcept : bottom_(std::exchange(other.bottom_, nullptr)) {}

void Fibre::Start(Stack* stack, void (*body)()) {
  stack_ = stack;
  body_ = body;
  own_fake_ = nullptr;
#ifdef CODISTILL_ASAN
  // What an earlier fibre left there.
  ASAN_UNPOISON_MEMORY_REGION(stack->bottom(), Stack::size());
#endif
#if defined(__x86_64__)
  // As if Main had called CodistillSwitchStack at its first instruction.
  auto* top = reinterpret_cast<uintptr_t*>(stack->bottom() + Stack::size());
  *--top = 0;  // where Main would return to
  *--top = reinterpret_cast<uintptr_t>(&Fibre::Main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  own_ = top;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack->bottom();
  own_.uc_stack.ss_size = Stack::size();
  own_.uc_link = nullptr;
  makecontext(&own_, &Fibre::Main, 0);
#endif
}

void Fibre::Enter() {
  entered = this;
#ifdef CODISTILL_ASAN
  __sanitizer_start_switch_fiber(&caller_fake_, stack_->bottom(), Stack::size());
#endif
#if defined(__x86_64__)
  CodistillSwitchStack(&caller_, own_);
#else
  swapcontext(&caller_, &own_);
#endif
#ifdef CODISTILL_ASAN
  __sanitizer_finish_switch_fiber(caller_fake_, nullptr, nullptr);
#endif
}

void Fibre::Leave() {
#ifdef CODISTILL_ASAN
  // A fibre that has ended keeps no frames.
  __sanitizer_start_switch_fiber(body_ == nullptr ? nullptr : &own_fake_, caller_bottom_,
                                 caller_size_);
#endif
#if defined(__x86_64__)
  CodistillSwitchStack(&own_, caller_);
#else
  swapcontext(&own_, &caller_);
#endif
#ifdef CODISTILL_ASAN
  __sanitizer_finish_switch_fiber(own_fake_, &caller_bottom_, &caller_size_);
#endif
}

void Fibre::Main() {
  Fibre* const self = entered;
#ifdef CODISTILL_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_bottom_, &self->caller_size_);
#endif
  self->body_();
  self->body_ = nullptr;
  self->Leave();
  abort();  // nobody enters a fibre that has ended
}

}  // namespace codistill::emulated
