// An mbarrier: a phase is over once `count` threads have arrived and all expected bytes have come. Who waits for it sees
// what those threads did before they arrived, and the bytes; phases alternate between parity 0 and 1, and a wait for
// the parity that is not under way returns at once: for 1 on a new mbarrier.
//
// A stage of a pipeline has two, `full` (count 1: the producer) and `empty` (count: the consumers):
//     producer   empty.wait(parity ^ 1); full.arrive_expect_tx(bytes); load_box(..., &full, ...)
//     consumer   full.wait(parity); read; fence_proxy_async(); sync_warp(); one lane: empty.arrive()
//
// The fence: ordinary reads (ldmatrix too) and the TMA's next writes go by different proxies, which an arrival alone
// does not order. CUTLASS leaves it out, Triton puts it in; on sm_90 it is MEMBAR.ALL.CTA and FENCE.VIEW.ASYNC.
#pragma once

#include "cuda/device/memory.h"

namespace pagewire {

#if defined(PAGEWIRE_EMULATE)

struct Mbarrier {
    uint64_t bits;

    void init(int count, Where where = Where::here()) { Block::running().init_mbarrier(this, count, where); }
    void arrive(Where where = Where::here()) { Block::running().arrive(this, where); }
    void expect_tx(int bytes, Where where = Where::here()) { Block::running().expect_bytes(this, bytes, where); }
    void arrive_expect_tx(int bytes, Where where = Where::here()) {
        expect_tx(bytes, where);
        arrive(where);
    }
    void wait(int parity, Where where = Where::here()) { Block::running().wait(this, parity, where); }
};

inline void fence_mbarrier_init() { Block::running().fence_mbarrier_init(); }
inline void fence_proxy_async() { Block::running().fence_proxy_async(); }

#else

struct Mbarrier {
    uint64_t bits;

    PW_DEVICE void init(int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
    }
    PW_DEVICE void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    // This phase is not over before so many more bytes have come.
    PW_DEVICE void expect_tx(int bytes) {
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    PW_DEVICE void arrive_expect_tx(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    // Until the phase of this parity is over.
    PW_DEVICE void wait(int parity) {
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
            "@!over bra again;\n"
            "}" ::"r"(shared_address(this)),
            "r"(parity)
            : "memory");
    }
};

// After this thread's init(), before the barrier that lets others load for the mbarrier.
PW_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Between ordinary accesses of shared memory and a TMA load into it: by those who made them, before they arrive.
PW_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

}  // namespace pagewire
