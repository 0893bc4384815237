// The vector vocabulary over AVX2, FMA and F16C. Included inside the anonymous namespace of target_avx2.cpp.

using F = __m256;
using M = __m256;
constexpr int kLanes = 8;
constexpr int kTileAccs = 8;
constexpr int kMaxRowBlock = 2;
constexpr int kGemmRows = 6;
constexpr int kGemmVecs = 2;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }  // b if either is NaN
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline F round_even(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline M less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
inline F pair_sums(F a, F b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); }
inline float sum(F a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float maximum(F a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
// p * 2^n for integral n in [-200, 0]; 0 where it underflows.
inline F scale_by_power(F p, F n) {
    const F normal = max(n, set1(-126.0f));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(normal), _mm256_set1_epi32(127)), 23);
    return select(less(n, set1(-126.0f)), zero(), mul(p, _mm256_castsi256_ps(exponent)));
}
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// Past the caches, straight to memory: `to` is aligned to 64 bytes. Ordered by stream_end().
inline void stream64(void* to, const void* from) {
    const auto* source = static_cast<const __m256i*>(from);
    auto* target = static_cast<__m256i*>(to);
    _mm256_stream_si256(target, _mm256_loadu_si256(source));
    _mm256_stream_si256(target + 1, _mm256_loadu_si256(source + 1));
}
inline void stream_end() { _mm_sfence(); }

// Lane i of the result is the sum of a[i].
inline F sums(const F* a) {
    F quad[2];
#pragma GCC unroll 4
    for (int i = 0; i < 2; ++i) {
        const F x = pair_sums(a[4 * i], a[4 * i + 1]);
        const F y = pair_sums(a[4 * i + 2], a[4 * i + 3]);
        quad[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))),
                                _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))));
    }
    return _mm256_add_ps(_mm256_permute2f128_ps(quad[0], quad[1], 0x20),
                         _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

inline __m256 as_ps(__m256d a) { return _mm256_castpd_ps(a); }
inline __m256d as_pd(__m256 a) { return _mm256_castps_pd(a); }

// Rows become columns.
inline void transpose(F* a) {
    F b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) {
        const F lo0 = _mm256_unpacklo_ps(a[i], a[i + 1]);
        const F hi0 = _mm256_unpackhi_ps(a[i], a[i + 1]);
        const F lo1 = _mm256_unpacklo_ps(a[i + 2], a[i + 3]);
        const F hi1 = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i] = as_ps(_mm256_unpacklo_pd(as_pd(lo0), as_pd(lo1)));
        b[i + 1] = as_ps(_mm256_unpackhi_pd(as_pd(lo0), as_pd(lo1)));
        b[i + 2] = as_ps(_mm256_unpacklo_pd(as_pd(hi0), as_pd(hi1)));
        b[i + 3] = as_ps(_mm256_unpackhi_pd(as_pd(hi0), as_pd(hi1)));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        a[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

// ---- storage types

inline __m128i load_words(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

inline F load(const Float16* p) { return _mm256_cvtph_ps(load_words(p)); }
inline F load(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p)), 16));
}
inline F load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bytes(p))); }
inline F load(const Float8E5M2* p) {  // e5m2 is the upper byte of a half
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(load_bytes(p)), 8));
}
inline F load(const Float8E4M3* p) {  // exponent and mantissa moved into a half are 2^-8 of the value
    const __m128i words = _mm_cvtepi8_epi16(load_bytes(p));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16(short(0xbf80)));
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(words, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7f));
    const F x = _mm256_mul_ps(_mm256_cvtph_ps(half), set1(256.0f));
    return _mm256_or_ps(x, _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_cvtepi16_epi32(nan),
                                                                 1)));  // the sign stays
}

inline __m128i narrow_words(__m256i lanes) {  // values in [0, 65535]
    const __m256i packed = _mm256_packus_epi32(lanes, lanes);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline void store_bytes(void* p, __m256i lanes) {
    const __m128i words = narrow_words(_mm256_and_si256(lanes, _mm256_set1_epi32(0xff)));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline void store(Float16* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(BFloat16* p, F x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i bits = _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_words(_mm256_srli_epi32(bits, 16)));
}
inline void store(int8_t* p, F x) {
    store_bytes(p, _mm256_cvtps_epi32(_mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q))));
}
// x is NaN or at most the largest finite value; the integer steps are those of the scalar
// definition in simd_scalar.h
template <int kMantissa, int kBias>
inline __m256i to_float8(F x) {
    constexpr int kDrop = 23 - kMantissa;
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(int(0x80000000)));
    const __m256i u = _mm256_xor_si256(bits, sign);  // below 2^31: signed compares are fine
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, kDrop), _mm256_set1_epi32(1));
    const __m256i rebias = _mm256_set1_epi32((kBias - 127) * (1 << 23) + (1 << (kDrop - 1)) - 1);
    const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, rebias), odd), kDrop);
    const __m256i shifter = _mm256_set1_epi32((127 - kBias + 1 + kDrop) << 23);
    const __m256i tiny = _mm256_sub_epi32(
        _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(u), _mm256_castsi256_ps(shifter))), shifter);
    const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32((127 - kBias + 1) << 23), u);
    const __m256i is_nan = _mm256_cmpgt_epi32(u, _mm256_set1_epi32(0x7f800000));
    __m256i y = _mm256_blendv_epi8(normal, tiny, is_tiny);
    y = _mm256_or_si256(y, _mm256_srli_epi32(sign, 24));
    return _mm256_blendv_epi8(y, _mm256_set1_epi32(0x7f), is_nan);
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

template <>
struct Wide<BFloat16> {  // even elements, then odd ones
    static constexpr int kVecs = 2;
    static constexpr float kFactor = 1.0f;
    static void load(const BFloat16* p, F* x) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        x[0] = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
        x[1] = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))));
    }
    static constexpr int source(int i) { return i < 8 ? 2 * i : 2 * (i - 8) + 1; }
};
