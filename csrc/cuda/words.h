// Stored elements, a 32-bit word at a time, to fp32 and back: the bits of convert.h, in fewer instructions.
#pragma once

#include <type_traits>

#include "cuda/convert.h"

namespace pagewire {

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// The word's kPerWord<T> elements, in the order of memory.
template <class T>
PW_DEVICE void floats_of(uint32_t word, float* x) {
    if constexpr (std::is_same_v<T, float>) {
        x[0] = float_from_bits(word);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        x[0] = float_from_bits(word << 16);
        x[1] = float_from_bits(word & 0xffff0000);
    } else if constexpr (std::is_same_v<T, Float16>) {
        float16_pair(word, x[0], x[1]);
    } else if constexpr (std::is_same_v<T, Float8E5M2>) {
        // e5m2 is the upper byte of an fp16
        float16_pair(permute_bytes(word, 0, 0x1404), x[0], x[1]);
        float16_pair(permute_bytes(word, 0, 0x3424), x[2], x[3]);
    } else if constexpr (std::is_same_v<T, int8_t>) {
        // x + 128 in the low bits of 2^23 is a float that needs one subtraction
        PW_UNROLL
        for (uint32_t i = 0; i < 4; ++i) {
            x[i] = float_from_bits(permute_bytes(word ^ 0x80808080, 0x4b000000, 0x7650 + i)) - 8388736.0f;
        }
    } else {
        static_assert(std::is_same_v<T, Float8E4M3>);
#if defined(PW_HAS_FLOAT8)
        float16_pair(float16_from_e4m3(word), x[0], x[1]);
        float16_pair(float16_from_e4m3(word >> 16), x[2], x[3]);
#else
        PW_UNROLL
        for (int i = 0; i < 4; ++i) x[i] = to_float(T{static_cast<uint8_t>(word >> (8 * i))});
#endif
    }
}

// The low bytes of four words.
PW_DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return permute_bytes(permute_bytes(a, b, 0x0040), permute_bytes(c, d, 0x0040), 0x5410);
}

template <class T>
PW_DEVICE uint32_t word_of(const float* x) {
    if constexpr (std::is_same_v<T, float>) {
        return float_bits(x[0]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        return pack_bfloat16(x[0], x[1]);
    } else if constexpr (std::is_same_v<T, Float16>) {
        return pack_float16(x[0], x[1]);
    } else if constexpr (std::is_same_v<T, int8_t>) {
        uint32_t bits[4];
        PW_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float number = x[i] == x[i] ? x[i] : 0.0f;
            // 1.5 * 2^23 has no place for a fraction: the sum rounds to even, and its low byte is the integer
            bits[i] = float_bits(min_number(max_number(number, -127.0f), 127.0f) + 12582912.0f);
        }
        return low_bytes(bits[0], bits[1], bits[2], bits[3]);
    } else {
        static_assert(std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>);
#if defined(PW_HAS_FLOAT8)
        if constexpr (std::is_same_v<T, Float8E4M3>) {
            return permute_bytes(pack_e4m3(x[0], x[1]), pack_e4m3(x[2], x[3]), 0x5410);
        } else {
            return permute_bytes(pack_e5m2(x[0], x[1]), pack_e5m2(x[2], x[3]), 0x5410);
        }
#else
        T y[4];
        PW_UNROLL
        for (int i = 0; i < 4; ++i) from_float(x[i], y[i]);
        return low_bytes(y[0].bits, y[1].bits, y[2].bits, y[3].bits);
#endif
    }
}

}  // namespace pagewire
