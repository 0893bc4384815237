#include "emulation/fiber.h"

#if defined(__x86_64__)
asm(R"(
    .text
    .globl pagewire_switch_stack
    .type pagewire_switch_stack, @function
pagewire_switch_stack:
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
    .size pagewire_switch_stack, .-pagewire_switch_stack
)");
#endif

namespace pagewire::emulation {

namespace {
Fiber* starting = nullptr;  // handed to the trampoline, which takes no argument
}

void Fiber::enter(Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self->outer_stack_, &self->outer_bytes_);
#endif
    self->entry_(self->argument_);
    self->leave(/*ends=*/true);
    std::abort();  // an ended fiber was resumed
}

#if defined(__x86_64__)

void Fiber::trampoline() { enter(starting); }

void Fiber::start(Entry entry, void* argument) {
    entry_ = entry;
    argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);
    fake_inside_ = nullptr;
#endif
    void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(&Fiber::trampoline);  // where the first switch returns to
    inside_ = top - 6;                                   // room for the six registers it pops
    for (int i = 1; i <= 6; ++i) top[-i] = nullptr;
}

#else

void Fiber::trampoline(unsigned low, unsigned high) {
    enter(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(low) | static_cast<uintptr_t>(high) << 32));
}

void Fiber::start(Entry entry, void* argument) {
    entry_ = entry;
    argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);
    fake_inside_ = nullptr;
#endif
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_;
    inside_.uc_stack.ss_size = kStackBytes;
    inside_.uc_link = nullptr;
    const uintptr_t self = reinterpret_cast<uintptr_t>(this);
    makecontext(&inside_, reinterpret_cast<void (*)()>(&Fiber::trampoline), 2, static_cast<unsigned>(self),
                static_cast<unsigned>(self >> 32));
}

#endif

void Fiber::resume() {
    starting = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_outside_, stack_, kStackBytes);
#endif
#if defined(__x86_64__)
    pagewire_switch_stack(&outside_, inside_);
#else
    swapcontext(&outside_, &inside_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_inside_, outer_stack_, outer_bytes_);
#endif
#if defined(__x86_64__)
    pagewire_switch_stack(&inside_, outside_);
#else
    swapcontext(&inside_, &outside_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_inside_, &outer_stack_, &outer_bytes_);
#endif
}

}  // namespace pagewire::emulation
