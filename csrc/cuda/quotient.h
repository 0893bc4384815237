// x / divisor as IEEE rounds it, wherever that decides an 8-bit code, with one reciprocal for many x.
//
// P. Markstein (IBM J. Res. Dev. 34, 1990): with r = 1 / d to nearest and q = x * r, the remainder x - q * d is exact in
// one fused multiply-add, and q + remainder * r rounds to the quotient, as long as nothing overflows and no bit falls
// below the range. Taken as q * d - x, the remainder of a zero leaves the zero its sign.
#pragma once

#include "cuda/device/arithmetic.h"

namespace pagewire {

struct Reciprocal {
    float divisor, inverse;
    float factor;  // of divisor and x, where the divisor is near an end of the range; else 1
};

constexpr float kMiddling = 0x1p60f;

PW_DEVICE Reciprocal reciprocal_of(float divisor) {
    const float size = magnitude(divisor);
    const float factor = size < 1.0f / kMiddling ? 0x1p80f : size > kMiddling ? 0x1p-80f : 1.0f;
    return {divisor * factor, reciprocal(divisor * factor), factor};
}

// That quotient() takes |x| <= largest.
PW_DEVICE bool is_plain(const Reciprocal& by, float largest) {
    return by.divisor > 0.0f && by.factor == 1.0f && largest < kMiddling;
}
// Every bit of zero and of what is at least 2^-40. Below, where x may be less than 2^-100 and the remainder lose bits, a
// quotient has zero's code and its own sign whatever it ends in.
PW_DEVICE float quotient(float x, const Reciprocal& by) {
    const float q = x * by.inverse;
    return fused_multiply_add(-fused_multiply_add(q, by.divisor, -x), by.inverse, q);
}

// Of any x and divisor: what is too large to be corrected saturates, what is too small has zero's code.
PW_DEVICE float any_quotient(float x, const Reciprocal& by) {
    const float q = x * by.factor * by.inverse;
    const float corrected = quotient(x * by.factor, by);
    return magnitude(q) > 0x1p-20f && magnitude(q) < 0x1p30f ? corrected : q;
}

}  // namespace pagewire
