// cp.async: from global to shared memory past registers, in groups a thread waits for.
#pragma once

#include "cuda/device/memory.h"

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

inline uint64_t evict_normal_policy() { return 0; }
inline uint64_t evict_first_policy() { return 1; }
inline void copy_async_16(void* shared, const void* global, int bytes, uint64_t policy, Where where = Where::here()) {
    Block::running().copy_async(shared, global, 16, bytes, where);
    Block::running().note_policy(bytes, policy == evict_first_policy());
}
inline void copy_async_16(void* shared, const void* global, uint64_t policy, Where where = Where::here()) {
    copy_async_16(shared, global, 16, policy, where);
}
inline void copy_async_4(void* shared, const void* global, int bytes, Where where = Where::here()) {
    Block::running().copy_async(shared, global, 4, bytes, where);
}
inline void commit_copies() { Block::running().commit_copies(); }
template <int kInFlight>
inline void wait_copies() {
    Block::running().wait_copies(kInFlight);
}

}  // namespace pagewire

#else

namespace pagewire {

// An L2 policy for bytes that are read once: they leave before anything else does.
PW_DEVICE uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// For bytes that are read again.
PW_DEVICE uint64_t evict_normal_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of shared memory from `bytes` of global memory and zeros, past registers and L1.
PW_DEVICE void copy_async_16(void* shared, const void* global, int bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "l"(policy)
                 : "memory");
}
PW_DEVICE void copy_async_16(void* shared, const void* global, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "l"(policy)
                 : "memory");
}
PW_DEVICE void copy_async_4(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
PW_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kInFlight of this thread's newest groups are still under way.
template <int kInFlight>
PW_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

}  // namespace pagewire

#endif
