// One call stack that can be left and entered again. AddressSanitizer is told about every switch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers, then the stack pointer into *save, and continues on the stack `load`.
extern "C" void pagewire_switch_stack(void** save, void* load);
#endif

namespace pagewire::emulation {

class Fiber {
  public:
    using Entry = void (*)(void* argument);

    Fiber() : stack_(static_cast<char*>(std::aligned_alloc(64, kStackBytes))) {
        if (!stack_) throw std::bad_alloc();
    }
    ~Fiber() { std::free(stack_); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() calls entry(argument) on this stack. What ran here before is forgotten.
    void start(Entry entry, void* argument);

    // Runs the fiber until it yields or ends.
    void resume();

    // Back to the one that resumed the running fiber.
    void yield() { leave(/*ends=*/false); }

  private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kStackBytes = 512 * 1024;  // red zones around every local
#else
    static constexpr size_t kStackBytes = 64 * 1024;
#endif

    static void enter(Fiber* self);
    void leave(bool ends);

    char* stack_;
    Entry entry_ = nullptr;
    void* argument_ = nullptr;
#if defined(__x86_64__)
    void* inside_ = nullptr;   // stack pointer of the fiber while it is suspended
    void* outside_ = nullptr;  // stack pointer of its resumer while it runs
    static void trampoline();
#else
    ucontext_t inside_, outside_;
    static void trampoline(unsigned low, unsigned high);
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_inside_ = nullptr;
    void* fake_outside_ = nullptr;
    const void* outer_stack_ = nullptr;
    size_t outer_bytes_ = 0;
#endif
};

}  // namespace pagewire::emulation
