// Switching between fibers: twelve instructions on x86-64, ucontext elsewhere (and with -DEMULATOR_UCONTEXT, where a test holds
// the two equal). ThreadSanitizer is told about every switch, and that a switch orders nothing.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_func_entry(void* caller);
void __tsan_func_exit();
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

// What the race checker sees of a fiber. Without it, nothing.
class RaceChecker {
 public:
#if defined(EMULATOR_TSAN)
  static constexpr bool enabled = true;
  using Fiber = void*;
  static Fiber current() { return __tsan_get_current_fiber(); }
  static Fiber create(const char* name) {
    Fiber fiber = __tsan_create_fiber(0);
    __tsan_set_fiber_name(fiber, name);
    return fiber;
  }
  static void destroy(Fiber fiber) { __tsan_destroy_fiber(fiber); }
  static void switch_to(Fiber fiber) { __tsan_switch_to_fiber(fiber, 1 /* orders nothing */); }
  static void acquire(void* tag) { __tsan_acquire(tag); }
  static void release(void* tag) { __tsan_release(tag); }
  // `caller` is the address in the kernel that reports name.
  static void reads(const void* p, size_t bytes, void* caller) {
    __tsan_func_entry(caller);
    __tsan_read_range(const_cast<void*>(p), bytes);
    __tsan_func_exit();
  }
  static void writes(void* p, size_t bytes, void* caller) {
    __tsan_func_entry(caller);
    __tsan_write_range(p, bytes);
    __tsan_func_exit();
  }
  // The emulator's own lists grow in one fiber and are freed in another.
  static void ignore_begin() { AnnotateIgnoreWritesBegin("", 0); }
  static void ignore_end() { AnnotateIgnoreWritesEnd("", 0); }
#else
  static constexpr bool enabled = false;
  struct Fiber {
    explicit operator bool() const { return false; }
  };
  static Fiber current() { return {}; }
  static Fiber create(const char*) { return {}; }
  static void destroy(Fiber) {}
  static void switch_to(Fiber) {}
  static void acquire(void*) {}
  static void release(void*) {}
  static void reads(const void*, size_t, void*) {}
  static void writes(void*, size_t, void*) {}
  static void ignore_begin() {}
  static void ignore_end() {}
#endif
};

// Memory between two pages that nobody may touch, aligned to 128 bytes at its beginning and ending right at the second page
// (up to the padding that the alignment costs).
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) {
    const size_t inside = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = inside + 2 * kPage;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + kPage, inside, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    end_ = base_ + kPage + inside;
    data_ = end_ - (bytes + 127) / 128 * 128;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, mapped_); }
  char* data() const { return data_; }
  char* end() const { return end_; }

 private:
  static constexpr size_t kPage = 4096;
  char *base_, *data_, *end_;
  size_t mapped_;
};

#if defined(EMULATOR_UCONTEXT)

struct Context {
  ucontext_t machine;
};
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = bytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }

#else

struct Context {
  void* stack_pointer;
};
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // The six saved registers, then the return address; at the entry the stack is 8 bytes off a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
inline void switch_context(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emulator
