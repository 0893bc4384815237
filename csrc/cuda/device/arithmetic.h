// Functions of fp32, and how it meets the 16-bit and 8-bit formats.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "cuda/device/language.h"

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

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
inline float reciprocal(float x) { return divide(1.0f, x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float magnitude(float x) { return std::fabs(x); }
// std::fmax makes a NaN of a signalling one
inline float max_number(float a, float b) { return std::isnan(a) || b > a ? b : a; }
inline float min_number(float a, float b) { return std::isnan(a) || b < a ? b : a; }
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

}  // namespace emulation

inline uint32_t pack_bfloat16(float low, float high) {
    return emulation::bfloat16_bits(low) | uint32_t(emulation::bfloat16_bits(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
    return emulation::float16_bits(low) | uint32_t(emulation::float16_bits(high)) << 16;
}
inline float float_from_float16(uint16_t bits) { return emulation::float_of_float16(bits); }
inline void float16_pair(uint32_t two, float& low, float& high) {
    low = emulation::float_of_float16(static_cast<uint16_t>(two));
    high = emulation::float_of_float16(static_cast<uint16_t>(two >> 16));
}

namespace emulation {

template <class F>
uint32_t two_float16(uint32_t a, uint32_t b, F f) {
    const auto half = [](uint32_t x, int i) { return float_of_float16(static_cast<uint16_t>(x >> 16 * i)); };
    return float16_bits(f(half(a, 0), half(b, 0))) | uint32_t(float16_bits(f(half(a, 1), half(b, 1)))) << 16;
}

}  // namespace emulation

inline uint32_t add_float16(uint32_t a, uint32_t b) {
    return emulation::two_float16(a, b, [](float x, float y) { return x + y; });
}
inline uint32_t multiply_float16(uint32_t a, uint32_t b) {
    return emulation::two_float16(a, b, [](float x, float y) { return x * y; });
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | uint64_t(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return result;
}

}  // namespace pagewire

#else

namespace pagewire {

PW_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PW_DEVICE float log2_fast(float x) { return __log2f(x); }
PW_DEVICE float exp_exact(float x) { return expf(x); }
PW_DEVICE float log_exact(float x) { return logf(x); }
PW_DEVICE float tanh_exact(float x) { return tanhf(x); }
PW_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }  // IEEE, whatever -use_fast_math
PW_DEVICE float reciprocal(float x) { return __frcp_rn(x); }          // IEEE too
// a * b + c, rounded once.
PW_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PW_DEVICE float magnitude(float x) { return fabsf(x); }
// The other one where one is NaN.
PW_DEVICE float max_number(float a, float b) { return fmaxf(a, b); }
PW_DEVICE float min_number(float a, float b) { return fminf(a, b); }
PW_DEVICE float round_even(float x) { return rintf(x); }
PW_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
PW_DEVICE float float_from_bits(uint32_t x) { return __uint_as_float(x); }
PW_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Two floats to two 16-bit values, round to nearest even; `low` in the low half.
PW_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE uint32_t pack_float16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE float float_from_float16(uint16_t bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}
// Two fp16 values to two floats.
PW_DEVICE void float16_pair(uint32_t two, float& low, float& high) {
    asm("{ .reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high)
        : "r"(two));
}

// Two sums, two products of fp16.
PW_DEVICE uint32_t add_float16(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
PW_DEVICE uint32_t multiply_float16(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define PW_HAS_FLOAT8 1
// Two fp8 values in the low 16 bits to two fp16 values, exact.
PW_DEVICE uint32_t float16_from_e4m3(uint32_t two) {
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(two)));
    return r;
}
// Two floats to two fp8 values, saturating, round to nearest even; NaN is 0x7f, without a sign.
PW_DEVICE uint32_t pack_e4m3(float low, float high) {
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE uint32_t pack_e5m2(float low, float high) {
    uint16_t r;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// Bytes chosen by the four nibbles of `selector` out of b:a.
PW_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

}  // namespace pagewire

#endif

namespace pagewire {

PW_DEVICE bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

}  // namespace pagewire
