// A block's query rows in shared memory, and their way into registers.
#pragma once

#include "cuda/attention/shape.h"
#include "cuda/device/memory.h"

namespace pagewire {

// 2^n with n and -n in a normal float's range.
PW_DEVICE float power_of_two(int n) { return float_from_bits(static_cast<uint32_t>(n + 127) << 23); }

// The power of two that brings `largest` to below 2^15, from where fp16 reaches 2^29 down with all its digits.
PW_DEVICE int lift_exponent(float largest) {
    const int exponent = static_cast<int>(float_bits(largest) >> 23 & 0xff) - 127;
    return exponent < -112 ? 126 : 14 - exponent;
}

// Eight elements of a row of q as they lie in memory, zeros past the row's end.
template <class S>
PW_DEVICE Vec16 load_q_chunk(const AttentionPlan& p, const Piece& piece, int row, int chunk) {
    Vec16 x{};
    const int group_size = p.schedule.group_size;
    const int packed = piece.row_tile * p.schedule.row_tile_len + row, token = packed / group_size;
    if (token >= piece.q_len) return x;
    const int head = piece.head * group_size + packed - token * group_size, width = static_cast<int>(p.of.q.width);
    const char* at =
        p.of.q.data + 2 * ((piece.row_begin + token) * p.of.q.stride_row + head * p.of.q.stride_head + chunk * 8);
    if (p.q_aligned && chunk * 8 + 8 <= width) return load_global(reinterpret_cast<const Vec16*>(at));
    PW_UNROLL
    for (int e = 0; e < 8; ++e) {
        if (chunk * 8 + e >= width) continue;
        x.x[e / 2] |= static_cast<uint32_t>(load_global(reinterpret_cast<const uint16_t*>(at) + e)) << 16 * (e % 2);
    }
    return x;
}

// As fp16, times the row's power of two: what the row has of fp16's range does not depend on its size.
template <class S>
PW_DEVICE float lift_q(Vec16& x, bool bfloat16) {
    float y[8], largest = 0.0f;
    PW_UNROLL
    for (int e = 0; e < 8; ++e) {
        const auto bits = static_cast<uint16_t>(x.x[e / 2] >> 16 * (e % 2));
        y[e] = bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
        if (is_finite(y[e])) largest = fmaxf(largest, fabsf(y[e]));
    }
    PW_UNROLL
    for (int mask = 1; mask < S::kWidth / 8; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    const int exponent = lift_exponent(largest);
    PW_UNROLL
    for (int i = 0; i < 4; ++i) {
        x.x[i] = pack_float16(y[2 * i] * power_of_two(exponent), y[2 * i + 1] * power_of_two(exponent));
    }
    return power_of_two(-exponent);
}

template <class S, class V>
PW_DEVICE void store_q(char* rows, int row, int chunk, int byte, V value) {
    store_shared(reinterpret_cast<V*>(rows + swizzle<S::kQRowBytes>(row, chunk) + byte), value);
}

// By the first kWarps warps. `rows`: swizzled; `units`: what 1 in a row of an 8-bit cache's stands for.
//
// For an 8-bit cache the elements of each 16 are reordered, so that one 4-byte piece of a K row is what the tensor core
// step wants of it: of the 8 pairs, even ones go to the first chunk, odd ones to the second.
template <class S>
PW_DEVICE void load_queries(const AttentionPlan& p, const Piece& piece, char* rows, float* units) {
    constexpr int kChunks = S::kWidth / 8;  // of a row, a lane each
    for (int i = thread_index(); i < p.schedule.row_tile_len * kChunks; i += 32 * S::kWarps) {
        const int row = i / kChunks, chunk = i % kChunks;
        Vec16 x = load_q_chunk<S>(p, piece, row, chunk);
        if constexpr (S::kQuantised) {
            const float unit = lift_q<S>(x, p.q_bfloat16);
            if (chunk == 0) store_shared(units + row, unit);
            store_q<S>(rows, row, chunk & ~1, chunk % 2 * 8, Vec8{{x.x[0], x.x[2]}});
            store_q<S>(rows, row, chunk | 1, chunk % 2 * 8, Vec8{{x.x[1], x.x[3]}});
        } else {
            store_q<S>(rows, row, chunk, 0, x);
        }
    }
}

// Columns 16 step .. 16 step + 15 of 16 rows.
template <class S>
PW_DEVICE void load_q_step(uint32_t (&a)[4], const char* rows, int first_row, int step) {
    const int lane = thread_index() % 32;
    load_matrices(a, rows + swizzle<S::kQRowBytes>(first_row + lane % 16, 2 * step + lane / 16));
}

}  // namespace pagewire
