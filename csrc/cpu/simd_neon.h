// The vector vocabulary over AArch64 NEON. Included inside the anonymous namespace of target_neon.cpp.

using F = float32x4_t;
using M = uint32x4_t;
constexpr int kLanes = 4;
constexpr int kTileAccs = 16;
constexpr int kMaxRowBlock = 4;
constexpr int kGemmRows = 6;
constexpr int kGemmVecs = 4;

inline F zero() { return vdupq_n_f32(0.0f); }
inline F set1(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
inline M less(F a, F b) { return vcltq_f32(a, b); }
inline F select(M m, F yes, F no) { return vbslq_f32(m, yes, no); }
inline F max(F a, F b) { return select(vcgtq_f32(a, b), a, b); }  // b if either is NaN
inline F min(F a, F b) { return select(vcltq_f32(a, b), a, b); }
inline F abs(F a) { return vabsq_f32(a); }
inline F round_even(F a) { return vrndnq_f32(a); }
inline float sum(F a) { return vaddvq_f32(a); }
inline float maximum(F a) { return vmaxnmvq_f32(a); }
// p * 2^n for integral n in [-200, 0]; 0 where it underflows.
inline F scale_by_power(F p, F n) {
    const M tiny = less(n, set1(-126.0f));
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(max(n, set1(-126.0f))), vdupq_n_s32(127));
    return select(tiny, zero(), mul(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23))));
}
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void stream64(void* to, const void* from) { __builtin_memcpy(to, from, 64); }
inline void stream_end() {}

// Lane i of the result is the sum of a[i].
inline F sums(const F* a) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }

// Rows become columns.
inline void transpose(F* a) {
    const float32x4x2_t p = vtrnq_f32(a[0], a[1]), q = vtrnq_f32(a[2], a[3]);
    a[0] = vcombine_f32(vget_low_f32(p.val[0]), vget_low_f32(q.val[0]));
    a[1] = vcombine_f32(vget_low_f32(p.val[1]), vget_low_f32(q.val[1]));
    a[2] = vcombine_f32(vget_high_f32(p.val[0]), vget_high_f32(q.val[0]));
    a[3] = vcombine_f32(vget_high_f32(p.val[1]), vget_high_f32(q.val[1]));
}

// ---- storage types

inline F half_to_float(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
inline uint8x8_t load_bytes(const void* p) {  // the low four count
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return vcreate_u8(word);
}
inline uint16x4_t load_words(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }

inline F load(const Float16* p) { return half_to_float(load_words(p)); }
inline F load(const BFloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_words(p), 16)); }
inline F load(const int8_t* p) {
    const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(load_bytes(p)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}
inline F load(const Float8E5M2* p) {  // e5m2 is the upper byte of a half
    return half_to_float(vget_low_u16(vshll_n_u8(load_bytes(p), 8)));
}
inline F load(const Float8E4M3* p) {  // exponent and mantissa moved into a half: 2^-8 of the value
    const uint16x4_t words = vget_low_u16(vmovl_u8(load_bytes(p)));
    const uint16x4_t magnitude = vand_u16(words, vdup_n_u16(0x7f));
    const uint16x4_t sign = vshl_n_u16(vand_u16(words, vdup_n_u16(0x80)), 8);
    const F x = mul(half_to_float(vorr_u16(sign, vshl_n_u16(magnitude, 7))), set1(256.0f));
    const uint16x4_t nan = vceq_u16(magnitude, vdup_n_u16(0x7f));
    const M wide = vreinterpretq_u32_s32(vmovl_s16(vreinterpret_s16_u16(nan)));
    const uint32x4_t quiet = vandq_u32(wide, vdupq_n_u32(0x7fc00000));  // the sign stays
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(x), quiet));
}

inline void store_bytes(void* p, uint32x4_t lanes) {
    const uint16x4_t words = vmovn_u32(lanes);
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    __builtin_memcpy(p, &word, 4);
}
inline void store(Float16* p, F x) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x))); }
inline void store(BFloat16* p, F x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    const uint32x4_t bits = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(bits, 16));
}
inline void store(int8_t* p, F x) {  // NaN converts to 0
    store_bytes(p, vreinterpretq_u32_s32(vcvtnq_s32_f32(x)));
}
// x is NaN or at most the largest finite value; the integer steps are those of the scalar
// definition in simd_scalar.h
template <int kMantissa, int kBias>
inline uint32x4_t to_float8(F x) {
    constexpr int kDrop = 23 - kMantissa;
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t sign = vandq_u32(bits, vdupq_n_u32(0x80000000));
    const uint32x4_t u = veorq_u32(bits, sign);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, kDrop), vdupq_n_u32(1));
    const uint32x4_t rebias = vdupq_n_u32(uint32_t((kBias - 127) * (1 << 23) + (1 << (kDrop - 1)) - 1));
    const uint32x4_t normal = vshrq_n_u32(vaddq_u32(vaddq_u32(u, rebias), odd), kDrop);
    const uint32x4_t shifter = vdupq_n_u32(uint32_t(127 - kBias + 1 + kDrop) << 23);
    const F shifted = add(vreinterpretq_f32_u32(u), vreinterpretq_f32_u32(shifter));
    const uint32x4_t tiny = vsubq_u32(vreinterpretq_u32_f32(shifted), shifter);
    const M is_tiny = vcltq_u32(u, vdupq_n_u32(uint32_t(127 - kBias + 1) << 23));
    const M is_nan = vcgtq_u32(u, vdupq_n_u32(0x7f800000));
    uint32x4_t y = vbslq_u32(is_tiny, tiny, normal);
    y = vorrq_u32(y, vshrq_n_u32(sign, 24));
    return vbslq_u32(is_nan, vdupq_n_u32(0x7f), y);
}
inline void store(Float8E4M3* p, F x) { store_bytes(p, to_float8<3, 7>(x)); }
inline void store(Float8E5M2* p, F x) { store_bytes(p, to_float8<2, 15>(x)); }

template <class T>
struct Wide {  // see simd_avx512.h
    static constexpr int kVecs = 1;
    static constexpr float kFactor = 1.0f;
    static void load(const T* p, F* x) { x[0] = ::pagewire::cpu::load(p); }
    static constexpr int source(int i) { return i; }
};
