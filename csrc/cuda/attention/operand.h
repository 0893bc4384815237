// What the tensor core multiplies: 16-bit caches as they are, 8-bit caches as fp16, which holds all of their values.
#pragma once

#include <type_traits>

#include "cuda/convert.h"
#include "cuda/device/mma.h"

namespace pagewire {

template <class T>
struct OperandOf {
    using type = Float16;  // of Float8E4M3, Float8E5M2, int8_t
};
template <>
struct OperandOf<BFloat16> {
    using type = BFloat16;
};

template <class Operand>
PW_DEVICE uint32_t pack_operands(float low, float high) {
    if constexpr (std::is_same_v<Operand, BFloat16>) return pack_bfloat16(low, high);
    return pack_float16(low, high);
}

// c[16x8] += a[16x16] b[16x8]
template <class Operand>
PW_DEVICE void multiply_accumulate_as(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_accumulate<std::is_same_v<Operand, BFloat16>>(c, a, b0, b1);
}

// Bytes kLow and kHigh of a word, 8-bit values, as two fp16 values. Exact.
template <int kLow, int kHigh>
PW_DEVICE uint32_t widen(uint32_t word, Float8E5M2) {
    return permute_bytes(word, 0, 0x0404 | kLow << 4 | kHigh << 12);  // each the upper byte of 16 bits
}
template <int kLow, int kHigh>
PW_DEVICE uint32_t widen(uint32_t word, Float8E4M3) {
#if defined(PW_HAS_FLOAT8)
    return float16_from_e4m3(kHigh == kLow + 1 ? word >> 8 * kLow : permute_bytes(word, 0, kLow | kHigh << 4));
#else
    // the exponent's field in fp16's place, then the bias: 15 - 7; subnormals come out right, NaN is a value of its own
    const uint32_t spread = permute_bytes(word, 0, 0x0404 | kLow << 4 | kHigh << 12);
    const uint32_t half = (spread & 0x80008000) | (spread >> 1 & 0x3f803f80);
    const uint32_t nan = ((spread & 0x7f007f00) + 0x01000100) & 0x80008000;
    return multiply_float16(half, 0x5c005c00) | (nan - (nan >> 6));
#endif
}
template <int kLow, int kHigh>
PW_DEVICE uint32_t widen(uint32_t word, int8_t) {
    // x + 128 in the low bits of fp16's 1024: exact, and so is the difference
    return add_float16(permute_bytes(word ^ 0x80808080, 0x64646464, 0x4040 | kLow | kHigh << 8), 0xe480e480);
}

}  // namespace pagewire
