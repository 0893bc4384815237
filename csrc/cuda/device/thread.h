// Who a thread is, and how threads of a warp, of a block and of a launch meet.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device/language.h"

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

inline int thread_index() { return Block::running().thread(); }
inline uint32_t block_x() { return Block::running().block().x; }
inline uint32_t block_y() { return Block::running().block().y; }
inline uint32_t grid_x() { return Block::running().grid().x; }
inline char* shared_memory() { return Block::running().shared(); }

inline void sync_block(Where where = Where::here()) { Block::running().sync_block(where); }
inline void sync_warp(Where where = Where::here()) { Block::running().sync_warp(where); }

namespace emulation {

template <class T, class From>
T exchange(const char* name, T value, From from, Where where) {
    struct Lane {
        T value, result;
    } mine{value, value};
    Block::running().collective(name, where, mine, [&](Lane** lanes) {
        for (int i = 0; i < Block::kWarp; ++i) {
            const int source = from(i);
            if (source >= 0 && source < Block::kWarp) lanes[i]->result = lanes[source]->value;
        }
    });
    return mine.result;
}

}  // namespace emulation

template <class T>
T shuffle(T value, int lane, Where where = Where::here()) {
    struct Lane {
        T value, result;
        int lane;
    } mine{value, value, lane};
    Block::running().collective("shuffle", where, mine, [](Lane** lanes) {
        for (int i = 0; i < Block::kWarp; ++i) {
            lanes[i]->result = lanes[lanes[i]->lane % Block::kWarp]->value;
        }
    });
    return mine.result;
}
template <class T>
T shuffle_xor(T value, int mask, Where where = Where::here()) {
    return emulation::exchange("shuffle_xor", value, [mask](int i) { return i ^ mask; }, where);
}
template <class T>
T shuffle_up(T value, int delta, Where where = Where::here()) {
    return emulation::exchange("shuffle_up", value, [delta](int i) { return i - delta; }, where);
}
inline uint32_t ballot(bool value, Where where = Where::here()) {
    struct Lane {
        bool value;
        uint32_t result;
    } mine{value, 0};
    Block::running().collective("ballot", where, mine, [](Lane** lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < Block::kWarp; ++i) bits |= uint32_t(lanes[i]->value) << i;
        for (int i = 0; i < Block::kWarp; ++i) lanes[i]->result = bits;
    });
    return mine.result;
}

inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

inline int count_up_to(int* p, int last) {
    const uint32_t old = static_cast<uint32_t>(*p);
    *p = old >= static_cast<uint32_t>(last) ? 0 : static_cast<int>(old + 1);
    return static_cast<int>(old);
}
inline void atomic_max(int64_t* p, int64_t value) { *p = std::max(*p, value); }

}  // namespace pagewire

#else

namespace pagewire {

// aligned for TMA, whose swizzle repeats every 1024 bytes of address
extern __shared__ __align__(1024) Vec16 pagewire_shared_memory[];

PW_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PW_DEVICE uint32_t block_x() { return blockIdx.x; }
PW_DEVICE uint32_t block_y() { return blockIdx.y; }
PW_DEVICE uint32_t grid_x() { return gridDim.x; }
PW_DEVICE char* shared_memory() { return reinterpret_cast<char*>(pagewire_shared_memory); }

PW_DEVICE void sync_block() { __syncthreads(); }
PW_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
PW_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
PW_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
PW_DEVICE T shuffle_up(T value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
PW_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// The index of the lowest bit that is set; there is one.
PW_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Adds one, but goes from `last` to 0; returns the old value. Orders memory between blocks: with a
// block barrier before it, what the block has written is seen by whoever counts later; with one
// after it, the block sees what those have written that counted earlier.
PW_DEVICE int count_up_to(int* p, int last) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(last) : "memory");
    return old;
}
PW_DEVICE void atomic_max(int64_t* p, int64_t value) {
    atomicMax(reinterpret_cast<long long*>(p), static_cast<long long>(value));
}

}  // namespace pagewire

#endif
