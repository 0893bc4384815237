// The vector vocabulary in plain C++, four lanes at a time: any machine, and the plainest statement
// of what each word means. Included inside the anonymous namespace of target_scalar.cpp.

constexpr int kLanes = 4;
constexpr int kTileAccs = 8;
constexpr int kMaxRowBlock = 2;
constexpr int kGemmRows = 4;
constexpr int kGemmVecs = 2;

struct F {
    float lane[kLanes];
};
struct M {
    bool lane[kLanes];
};

template <class Op>
inline F map(Op op) {
    F y;
    for (int i = 0; i < kLanes; ++i) y.lane[i] = op(i);
    return y;
}

inline F zero() { return F{}; }
inline F set1(float x) {
    return map([&](int) { return x; });
}
inline F load(const float* p) {
    return map([&](int i) { return p[i]; });
}
inline void store(float* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}
inline F add(F a, F b) {
    return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F sub(F a, F b) {
    return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F mul(F a, F b) {
    return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F div(F a, F b) {
    return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F fma(F a, F b, F c) {
    return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline F fnma(F a, F b, F c) {
    return map([&](int i) { return c.lane[i] - a.lane[i] * b.lane[i]; });
}
inline F max(F a, F b) {  // b if either is NaN
    return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F min(F a, F b) {
    return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F abs(F a) {
    return map([&](int i) { return __builtin_fabsf(a.lane[i]); });
}
// Adding and subtracting 1.5 * 2^23 rounds to the nearest even integer; larger magnitudes are integers already.
inline float round_even(float a) {
    const float y = (a + 12582912.0f) - 12582912.0f;
    return __builtin_fabsf(a) < 4194304.0f ? y : a;
}
inline F round_even(F a) {
    return map([&](int i) { return round_even(a.lane[i]); });
}
inline M less(F a, F b) {
    M m;
    for (int i = 0; i < kLanes; ++i) m.lane[i] = a.lane[i] < b.lane[i];
    return m;
}
inline F select(M m, F yes, F no) {
    return map([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
}
inline float sum(F a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
inline float maximum(F a) {
    float y = a.lane[0];
    for (int i = 1; i < kLanes; ++i) y = y > a.lane[i] ? y : a.lane[i];
    return y;
}
inline uint32_t to_bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    return u;
}
inline float from_bits(uint32_t u) {
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}
// p * 2^n for integral n in [-200, 0]; 0 where it underflows. A NaN n keeps p.
inline F scale_by_power(F p, F n) {
    return map([&](int i) {
        if (n.lane[i] < -126.0f) return 0.0f;
        const int exponent = n.lane[i] == n.lane[i] ? int(n.lane[i]) : 0;
        return p.lane[i] * from_bits(uint32_t(exponent + 127) << 23);
    });
}
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void stream64(void* to, const void* from) { __builtin_memcpy(to, from, 64); }
inline void stream_end() {}

// Lane i of the result is the sum of a[i].
inline F sums(const F* a) {
    return map([&](int i) { return sum(a[i]); });
}

// Rows become columns.
inline void transpose(F* a) {
    F b[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) b[j].lane[i] = a[i].lane[j];
    }
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
}

// ---- storage types

inline float half_to_float(uint32_t h) {
    const uint32_t sign = (h & 0x8000) << 16;
    const uint32_t exponent = h >> 10 & 31;
    const uint32_t mantissa = h & 0x3ff;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        const float y = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign != 0 ? -y : y;
    }
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
// Round to nearest even into a float of kMantissa bits and exponent bias kBias whose largest
// exponent means inf or NaN (half, e5m2) or whose overflow has been excluded (e4m3): what remains
// of u above the format is the caller's business.
template <int kMantissa, int kBias>
inline uint32_t round_to(uint32_t u) {  // u: bits of a finite, non-negative fp32
    constexpr int kDrop = 23 - kMantissa;
    constexpr uint32_t kSmallestNormal = uint32_t(127 - kBias + 1) << 23;
    constexpr uint32_t kShifter = uint32_t(127 - kBias + 1 + kDrop) << 23;
    if (u < kSmallestNormal) return to_bits(from_bits(u) + from_bits(kShifter)) - kShifter;
    const uint32_t rebias = uint32_t((kBias - 127) * (1 << 23)) + (1u << (kDrop - 1)) - 1;
    return (u + rebias + (u >> kDrop & 1)) >> kDrop;
}
inline uint16_t float_to_half(float x) {
    const uint32_t sign = to_bits(x) >> 16 & 0x8000;
    const uint32_t u = to_bits(x) & 0x7fffffff;
    if (u > 0x7f800000) return uint16_t(sign | 0x7e00 | (u >> 13 & 0x1ff));
    if (u >= 0x47800000) return uint16_t(sign | 0x7c00);  // 2^16 and above
    return uint16_t(sign | round_to<10, 15>(u));
}
template <int kMantissa, int kBias>
inline uint8_t to_float8(float x) {
    const uint32_t sign = to_bits(x) >> 24 & 0x80;
    const uint32_t u = to_bits(x) & 0x7fffffff;
    return u > 0x7f800000 ? uint8_t(0x7f) : uint8_t(sign | round_to<kMantissa, kBias>(u));
}
inline uint16_t to_bfloat16(float x) {
    const uint32_t u = to_bits(x);
    if (x != x) return uint16_t((u | 0x400000) >> 16);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

inline F load(const Float16* p) {
    return map([&](int i) { return half_to_float(p[i].bits); });
}
inline F load(const BFloat16* p) {
    return map([&](int i) { return from_bits(uint32_t(p[i].bits) << 16); });
}
inline F load(const int8_t* p) {
    return map([&](int i) { return float(p[i]); });
}
inline F load(const Float8E5M2* p) {  // e5m2 is the upper byte of a half
    return map([&](int i) { return half_to_float(uint32_t(p[i].bits) << 8); });
}
inline F load(const Float8E4M3* p) {  // exponent and mantissa moved into a half are 2^-8 of the value
    return map([&](int i) {
        const uint32_t b = p[i].bits;
        if ((b & 0x7f) == 0x7f) return from_bits((b & 0x80) << 24 | 0x7fc00000);  // the sign stays
        return half_to_float((b & 0x80) << 8 | (b & 0x7f) << 7) * 256.0f;
    });
}
inline void store(Float16* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(x.lane[i]);
}
inline void store(BFloat16* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_bfloat16(x.lane[i]);
}
inline void store(int8_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i] == x.lane[i] ? int8_t(round_even(x.lane[i])) : int8_t(0);
}
inline void store(Float8E4M3* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_float8<3, 7>(x.lane[i]);
}
inline void store(Float8E5M2* p, F x) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_float8<2, 15>(x.lane[i]);
}

template <class T>
struct Wide {  // see simd_avx512.h
    static constexpr int kVecs = 1;
    static constexpr float kFactor = 1.0f;
    static void load(const T* p, F* x) { x[0] = ::pagewire::cpu::load(p); }
    static constexpr int source(int i) { return i; }
};
