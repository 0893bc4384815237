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

}  // namespace pagewire
