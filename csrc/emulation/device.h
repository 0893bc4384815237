// The device primitives on a CPU. See cuda/device.h for what they mean and block.h for what is checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulation/block.h"

#define PW_DEVICE inline
#define PW_HOST_DEVICE inline
#define PW_KERNEL(threads, min_blocks_per_sm)
#define PW_UNROLL
#define PW_NO_UNROLL
#define PW_UNROLL_BY(n)

namespace pagewire {

using emulation::Block;
using emulation::Where;

inline int thread_index() { return Block::running().thread(); }
inline uint32_t block_x() { return Block::running().block().x; }
inline uint32_t block_y() { return Block::running().block().y; }
inline uint32_t grid_x() { return Block::running().grid().x; }
inline char* shared_memory() { return Block::running().shared(); }

// ----------------------------------------------------------------------------- barriers, warps

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

inline int count_up_to(int* p, int last) {
    const uint32_t old = static_cast<uint32_t>(*p);
    *p = old >= static_cast<uint32_t>(last) ? 0 : static_cast<int>(old + 1);
    return static_cast<int>(old);
}
inline void atomic_max(int64_t* p, int64_t value) { *p = std::max(*p, value); }

// -------------------------------------------------------------------------------------- memory

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
template <class T>
T load_global_fresh(const T* p, Where where = Where::here()) {
    return load_global(p, where);
}
inline Vec16 load_streaming(const Vec16* p, Where where = Where::here()) { return load_global(p, where); }
inline void store_streaming(Vec16* p, Vec16 v, Where where = Where::here()) { store_global(p, v, where); }

inline uint64_t evict_normal_policy() { return 0; }
inline uint64_t evict_first_policy() { return 1; }
inline void copy_async_16(void* shared, const void* global, int bytes, uint64_t policy, Where where = Where::here()) {
    Block::running().copy_async(shared, global, 16, bytes, where);
    Block::running().note_policy(bytes, policy == evict_first_policy());
}
inline void copy_async_4(void* shared, const void* global, int bytes, Where where = Where::here()) {
    Block::running().copy_async(shared, global, 4, bytes, where);
}
inline void commit_copies() { Block::running().commit_copies(); }
template <int kInFlight>
inline void wait_copies() {
    Block::running().wait_copies(kInFlight);
}

// ---------------------------------------------------------------------------------- arithmetic

inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float exp_exact(float x) { return std::exp(x); }
inline float log_exact(float x) { return std::log(x); }
inline float tanh_exact(float x) { return std::tanh(x); }
inline float divide(float a, float b) {
    // IEEE defines what UndefinedBehaviorSanitizer would call a fault: x / 0
    return b == 0.0f ? (a == 0.0f || std::isnan(a)
                            ? std::numeric_limits<float>::quiet_NaN()
                            : std::copysign(std::numeric_limits<float>::infinity(), a) * std::copysign(1.0f, b))
                     : a / b;
}
inline float round_even(float x) { return std::nearbyint(x); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

namespace emulation {

inline uint16_t bfloat16_bits(float x) {
    const uint32_t bits = float_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float16_bits(float x) {
    const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000;
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    if (magnitude < 0x1p-14f) {
        // the sum rounds at 2^-24, the step of fp16's subnormals
        return static_cast<uint16_t>(sign | (float_bits(magnitude + 0.5f) - float_bits(0.5f)));
    }
    const uint32_t b = (bits & 0x7fffffff) - (112u << 23);
    return static_cast<uint16_t>(sign | ((b + 0xfff + (b >> 13 & 1)) >> 13));
}

inline float float_of_float16(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    return float_from_bits(sign | float_bits(float_from_bits(rest << 13) * 0x1p112f));
}

inline float float_of_half(uint32_t two, int which, bool bfloat16) {
    const auto h = static_cast<uint16_t>(two >> (16 * which));
    return bfloat16 ? float_from_bits(uint32_t(h) << 16) : float_of_float16(h);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Where where) {
    struct Lane {
        const void* row;
        uint32_t* r;
    } mine{row, r};
    Block& block = Block::running();
    block.check_alignment(row, 16, where);
    block.check_shared_read(row, 16, where, /*by_whole_warp=*/true);
    block.collective("ldmatrix", where, mine, [transposed](Lane** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t m[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(m[i], lanes[8 * matrix + i]->row, 16);
            for (int lane = 0; lane < Block::kWarp; ++lane) {
                const int g = lane / 4, t = lane % 4 * 2;
                lanes[lane]->r[matrix] =
                    transposed ? m[t][g] | uint32_t(m[t + 1][g]) << 16 : m[g][t] | uint32_t(m[g][t + 1]) << 16;
            }
        }
    });
}

}  // namespace emulation

inline uint32_t pack_bfloat16(float low, float high) {
    return emulation::bfloat16_bits(low) | uint32_t(emulation::bfloat16_bits(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
    return emulation::float16_bits(low) | uint32_t(emulation::float16_bits(high)) << 16;
}
inline float float_from_float16(uint16_t bits) { return emulation::float_of_float16(bits); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | uint64_t(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}

// --------------------------------------------------------------------------------- tensor core

inline void load_matrices(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
    emulation::load_matrices(r, row, false, where);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
    emulation::load_matrices(r, row, true, where);
}

template <bool kBFloat16>
inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                Where where = Where::here()) {
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } mine{c, a, {b0, b1}};
    Block::running().collective("mma", where, mine, [](Lane** lanes) {
        float A[16][16], B[8][16];  // B transposed: the sums below run over contiguous memory
        for (int lane = 0; lane < Block::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                for (int h = 0; h < 2; ++h) {
                    A[g + 8 * (i % 2)][t + h + 8 * (i / 2)] = emulation::float_of_half(lanes[lane]->a[i], h, kBFloat16);
                }
            }
            for (int i = 0; i < 2; ++i) {
                for (int h = 0; h < 2; ++h) {
                    B[g][t + h + 8 * i] = emulation::float_of_half(lanes[lane]->b[i], h, kBFloat16);
                }
            }
        }
        for (int lane = 0; lane < Block::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                const float* row = A[g + 8 * (i / 2)];
                const float* column = B[t + i % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                lanes[lane]->c[i] += sum;
            }
        }
    });
}

}  // namespace pagewire
