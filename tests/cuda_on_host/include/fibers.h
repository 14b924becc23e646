// Fibers: stacks of their own for functions that wait in the middle and go on later, all in one OS thread.
//
// ucontext's swapcontext costs a system call, and a block of 256 threads changes fibers thousands of times, so x86-64
// has a switch of its own. AddressSanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RK_FIBERS_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define RK_FIBERS_ASAN
#endif
#if defined(RK_FIBERS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Its frame on a stack that is left for good would stay poisoned.
#define RK_FIBERS_UNCHECKED __attribute__((no_sanitize("address")))

namespace rk_cuda_on_host {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

#if defined(__clang__)
#define RK_FIBERS_OPAQUE naked, noinline
#else
#define RK_FIBERS_OPAQUE naked, noinline, noipa  // else GCC may see which registers survive, and rely on it
#endif
// Saves what a call must preserve, and returns into the other stack as if that one's own call had ended.
__attribute__((RK_FIBERS_OPAQUE)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void switch_context(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }

inline void make_context(Context& context, char* /*bottom*/, char* top, void (*entry)()) {
  auto* words = reinterpret_cast<uint64_t*>(top) - 8;  // six registers, where to return to, and whence entry() came
  for (int i = 0; i < 8; ++i) words[i] = 0;
  words[6] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = words;
}
#else
struct Context {
  ucontext_t context;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void make_context(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = bottom;
  context.context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// A stack that is made once and started any number of times. run() enters it from the caller's stack, which must be
// the same for all fibers; leave(), called inside, goes back there.
class Fiber {
 public:
  explicit Fiber(size_t number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // an overflow of the stack is a fault, not a neighbour's damage
    bottom_ = static_cast<char*>(memory) + page;
    // Staggered, or the busy ends of all stacks would compete for the same few lines of the CPU's caches.
    top_ = static_cast<char*>(memory) + kBytes - (number % 64) * 576;
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)()) { make_context(context_, bottom_, top_, entry); }

  RK_FIBERS_UNCHECKED void run() {
#if defined(RK_FIBERS_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, bottom_, static_cast<size_t>(top_ - bottom_));
#endif
    switch_context(caller(), context_);
#if defined(RK_FIBERS_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // The first thing that an entry function calls.
  void entered() {
#if defined(RK_FIBERS_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &caller_bottom(), &caller_bytes());
#endif
  }

  RK_FIBERS_UNCHECKED void leave(bool for_good = false) {
#if defined(RK_FIBERS_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, caller_bottom(), caller_bytes());
#endif
    switch_context(context_, caller());
#if defined(RK_FIBERS_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, &caller_bottom(), &caller_bytes());
#endif
    static_cast<void>(for_good);
  }

  // For a fiber that was left in the middle and will not go on: its frames' red zones must not outlive them.
  void abandon() {
#if defined(RK_FIBERS_ASAN)
    __asan_unpoison_memory_region(bottom_, static_cast<size_t>(top_ - bottom_));
#endif
  }

 private:
  static constexpr size_t kBytes = 256 * 1024;

  static Context& caller() {
    static Context context;
    return context;
  }
#if defined(RK_FIBERS_ASAN)
  static const void*& caller_bottom() {
    static const void* bottom = nullptr;
    return bottom;
  }
  static size_t& caller_bytes() {
    static size_t bytes = 0;
    return bytes;
  }
#endif

  Context context_;
  char *bottom_, *top_;
};

}  // namespace rk_cuda_on_host
