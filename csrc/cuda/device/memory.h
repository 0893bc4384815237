// Loads and stores of shared and of global memory.
#pragma once

#include "cuda/device/language.h"

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

template <class T>
T load_shared(const T* p, Where where = Where::here()) {
    Block::running().check_alignment(p, sizeof(T), where);
    Block::running().check_shared_read(p, sizeof(T), where);
    return *p;
}
template <class T>
void store_shared(T* p, T value, Where where = Where::here()) {
    Block::running().check_alignment(p, sizeof(T), where);
    Block::running().check_shared_write(p, sizeof(T), where);
    *p = value;
}

template <class T>
T load_global(const T* p, Where where = Where::here()) {
    Block::running().check_alignment(p, sizeof(T), where);
    return *p;
}
template <class T>
void store_global(T* p, T value, Where where = Where::here()) {
    Block::running().check_alignment(p, sizeof(T), where);
    *p = value;
}
inline void prefetch_global(const void*) {}
template <class T>
T load_global_fresh(const T* p, Where where = Where::here()) {
    return load_global(p, where);
}
inline Vec16 load_streaming(const Vec16* p, Where where = Where::here()) { return load_global(p, where); }

}  // namespace pagewire

#else

namespace pagewire {

PW_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

template <class T>
PW_DEVICE T load_shared(const T* p) {
    return *p;
}
template <class T>
PW_DEVICE void store_shared(T* p, T value) {
    *p = value;
}

template <class T>
PW_DEVICE T load_global(const T* p) {
    return *p;
}
template <class T>
PW_DEVICE void store_global(T* p, T value) {
    *p = value;
}
// Brings the line of `p`, which must be readable, to L2; nobody waits for it.
PW_DEVICE void prefetch_global(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Data that other blocks of this launch wrote: not through this SM's L1.
template <class T>
PW_DEVICE T load_global_fresh(const T* p) {
    return __ldcg(p);
}
template <>
PW_DEVICE Vec16 load_global_fresh<Vec16>(const Vec16* p) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
}

// Read once, not worth a place in L1.
PW_DEVICE Vec16 load_streaming(const Vec16* p) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "l"(p));
    return v;
}

}  // namespace pagewire

#endif
