// Conversions between the stored element types and fp32, bit for bit those of the reference backend.
#pragma once

#include "cuda/device/arithmetic.h"
#include "pagewire/dtype.h"

namespace pagewire {

// ------------------------------------------------------------------------------ to fp32, exact

PW_DEVICE float to_float(float x) { return x; }
PW_DEVICE float to_float(BFloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }
PW_DEVICE float to_float(Float16 x) { return float_from_float16(x.bits); }
PW_DEVICE float to_float(int8_t x) { return static_cast<float>(x); }
// e5m2 is the upper byte of an fp16
PW_DEVICE float to_float(Float8E5M2 x) { return float_from_float16(static_cast<uint16_t>(x.bits << 8)); }
PW_DEVICE float to_float(Float8E4M3 x) {
    const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = x.bits & 0x7f;
    if (rest == 0x7f) return float_from_bits(sign | 0x7fc00000);
    // exponent and mantissa in fp32's places, then the bias: 127 - 7; subnormals come out right too
    return float_from_bits(sign | float_bits(float_from_bits(rest << 20) * 0x1p120f));
}

// ----------------------------------------------------------------------------------- from fp32

PW_DEVICE void from_float(float x, float& y) { y = x; }
PW_DEVICE void from_float(float x, BFloat16& y) { y.bits = static_cast<uint16_t>(pack_bfloat16(x, 0.0f)); }
PW_DEVICE void from_float(float x, Float16& y) { y.bits = static_cast<uint16_t>(pack_float16(x, 0.0f)); }

// Round to nearest even into an fp8 of kMantissa bits, saturating; NaN is `nan`, without a sign.
template <int kMantissa, int kBias>
PW_DEVICE uint8_t encode_float8(float x, float largest, uint8_t nan) {
    const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80;
    uint32_t b = bits & 0x7fffffff;
    if (b > 0x7f800000) return nan;
    if (b > float_bits(largest)) b = float_bits(largest);
    if (b < (uint32_t(128 - kBias) << 23)) {
        // below the smallest normal: the sum rounds at the step of the subnormals
        const uint32_t magic = uint32_t(128 - kBias + 23 - kMantissa) << 23;
        b = float_bits(float_from_bits(b) + float_from_bits(magic)) - magic;
    } else {
        b -= uint32_t(127 - kBias) << 23;
        b = (b + (1u << (22 - kMantissa)) - 1 + (b >> (23 - kMantissa) & 1)) >> (23 - kMantissa);
    }
    return static_cast<uint8_t>(sign | b);
}
PW_DEVICE void from_float(float x, Float8E4M3& y) {
#if defined(PW_HAS_FLOAT8)
    y.bits = static_cast<uint8_t>(pack_e4m3(x, 0.0f));
#else
    y.bits = encode_float8<3, 7>(x, QuantMax<Float8E4M3>::value, 0x7f);
#endif
}
PW_DEVICE void from_float(float x, Float8E5M2& y) {
#if defined(PW_HAS_FLOAT8)
    y.bits = static_cast<uint8_t>(pack_e5m2(x, 0.0f));
#else
    y.bits = encode_float8<2, 15>(x, QuantMax<Float8E5M2>::value, 0x7f);
#endif
}
PW_DEVICE void from_float(float x, int8_t& y) {
    x = x != x ? 0.0f : round_even(x);
    y = static_cast<int8_t>(x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x);
}

// ------------------------------------------------------------------------------- not finite

// A stored value is infinite or NaN if its bits under kMask are all ones: kLowest then carries into
// the sign's place.
template <class T>
struct NonFinite {
    static constexpr uint32_t kMask = 0, kLowest = 0;  // int8_t: never
};
template <>
struct NonFinite<Float16> {
    static constexpr uint32_t kMask = 0x7c007c00, kLowest = 0x04000400;
};
template <>
struct NonFinite<BFloat16> {
    static constexpr uint32_t kMask = 0x7f807f80, kLowest = 0x00800080;
};
template <>
struct NonFinite<Float8E4M3> {
    static constexpr uint32_t kMask = 0x7f7f7f7f, kLowest = 0x01010101;
};
template <>
struct NonFinite<Float8E5M2> {
    static constexpr uint32_t kMask = 0x7c7c7c7c, kLowest = 0x04040404;
};

// One bit, at the sign's place, for each of the word's elements that is not finite.
template <class T>
PW_DEVICE uint32_t non_finite(uint32_t word) {
    constexpr uint32_t kSigns = sizeof(T) == 1 ? 0x80808080 : 0x80008000;
    return ((word & NonFinite<T>::kMask) + NonFinite<T>::kLowest) & kSigns;
}
// The word with zeros in their place.
template <class T>
PW_DEVICE uint32_t finite_only(uint32_t word) {
    const uint32_t found = non_finite<T>(word);
    return word & ~(sizeof(T) == 1 ? (found >> 7) * 0xff : (found >> 15) * 0xffff);
}

// All bits of the word's elements but their signs.
template <class T>
PW_DEVICE uint32_t magnitudes() {
    return NonFinite<T>::kMask == 0 ? 0xffffffff : sizeof(T) == 1 ? 0x7f7f7f7f : 0x7fff7fff;
}

PW_DEVICE bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

// ------------------------------------------------------------------------ tensor core operands

// Operands of the 16-bit tensor core step.
template <class T>
struct Operand;
template <>
struct Operand<BFloat16> {
    static constexpr bool kBFloat16 = true;
    PW_DEVICE static uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
};
template <>
struct Operand<Float16> {
    static constexpr bool kBFloat16 = false;
    PW_DEVICE static uint32_t pack(float low, float high) { return pack_float16(low, high); }
};

// Two stored 8-bit values (the low two bytes) as two 16-bit operands. Exact: every value fits both formats.
template <class Q>
PW_DEVICE uint32_t widen(uint32_t two, Float8E4M3) {
#if defined(PW_HAS_FLOAT8)
    const uint32_t half = float16_from_e4m3(two);
    if constexpr (!Operand<Q>::kBFloat16) return half;
    return pack_bfloat16(float_from_float16(static_cast<uint16_t>(half)),
                         float_from_float16(static_cast<uint16_t>(half >> 16)));
#else
    return Operand<Q>::pack(to_float(Float8E4M3{static_cast<uint8_t>(two)}),
                            to_float(Float8E4M3{static_cast<uint8_t>(two >> 8)}));
#endif
}
template <class Q>
PW_DEVICE uint32_t widen(uint32_t two, Float8E5M2) {
    const uint32_t half = permute_bytes(two, 0, 0x1404);  // each byte becomes the upper one of 16 bits
    if constexpr (!Operand<Q>::kBFloat16) return half;
    return pack_bfloat16(float_from_float16(static_cast<uint16_t>(half)),
                         float_from_float16(static_cast<uint16_t>(half >> 16)));
}
template <class Q>
PW_DEVICE uint32_t widen(uint32_t two, int8_t) {
    // x + 128 in the low bits of 2^23 is a float that needs one subtraction
    const uint32_t shifted = two ^ 0x8080;
    const float low = float_from_bits(permute_bytes(shifted, 0x4b000000, 0x7650));
    const float high = float_from_bits(permute_bytes(shifted, 0x4b000000, 0x7651));
    return Operand<Q>::pack(low - 8388736.0f, high - 8388736.0f);
}

}  // namespace pagewire
