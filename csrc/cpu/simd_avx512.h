// The vector vocabulary over AVX-512 (F, BW, DQ, VL): F is one register of kLanes floats.
// Included inside the anonymous namespace of target_avx512.cpp and target_amx.cpp.

using F = __m512;
using M = __mmask16;
constexpr int kLanes = 16;
constexpr int kTileAccs = 16;  // accumulators of the few-rows kernels
constexpr int kMaxRowBlock = 4;
constexpr int kGemmRows = 6;  // accumulators of the GEMM kernel: kGemmRows x kGemmVecs
constexpr int kGemmVecs = 4;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F round_even(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline M less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float maximum(F a) { return _mm512_reduce_max_ps(a); }
// p * 2^n for integral n in [-200, 0] and p near 1; 0 where it would be subnormal, because one such
// lane takes a hundred times as long as all others.
inline F scale_by_power(F p, F n) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, set1(-125.0f), _CMP_NLT_UQ), p, n);
}
// Into the second-level cache: the first has room for what is being worked on, and few fill buffers.
// Inlined by order: see fetch in move-inl.h.
[[gnu::always_inline]] inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Past the caches, straight to memory: `to` is aligned to 64 bytes. Ordered by stream_end().
inline void stream64(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
inline void stream_end() { _mm_sfence(); }

inline F pair_sums(F a, F b) {  // within 128-bit lanes: a0+a2, b0+b2, a1+a3, b1+b3
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

// Lane i of the result is the sum of a[i].
inline F sums(const F* a) {
    F quad[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const F x = pair_sums(a[4 * i], a[4 * i + 1]);
        const F y = pair_sums(a[4 * i + 2], a[4 * i + 3]);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
    }
    const F p =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
    const F q =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}

inline __m512 as_ps(__m512d a) { return _mm512_castpd_ps(a); }
inline __m512d as_pd(__m512 a) { return _mm512_castps_pd(a); }

// Rows become columns.
inline void transpose(F* a) {
    F b[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const F lo0 = _mm512_unpacklo_ps(a[i], a[i + 1]);
        const F hi0 = _mm512_unpackhi_ps(a[i], a[i + 1]);
        const F lo1 = _mm512_unpacklo_ps(a[i + 2], a[i + 3]);
        const F hi1 = _mm512_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i] = as_ps(_mm512_unpacklo_pd(as_pd(lo0), as_pd(lo1)));
        b[i + 1] = as_ps(_mm512_unpackhi_pd(as_pd(lo0), as_pd(lo1)));
        b[i + 2] = as_ps(_mm512_unpacklo_pd(as_pd(hi0), as_pd(hi1)));
        b[i + 3] = as_ps(_mm512_unpackhi_pd(as_pd(hi0), as_pd(hi1)));
    }
    for (int i = 0; i < 4; ++i) {  // b[4 g + i] holds columns i, 4 + i, 8 + i, 12 + i of row group g
        const F p = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88);
        const F q = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
        const F r = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
        const F s = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
        a[i] = _mm512_shuffle_f32x4(p, r, 0x88);
        a[8 + i] = _mm512_shuffle_f32x4(p, r, 0xdd);
        a[4 + i] = _mm512_shuffle_f32x4(q, s, 0x88);
        a[12 + i] = _mm512_shuffle_f32x4(q, s, 0xdd);
    }
}

// ---- storage types

inline __m256i load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline F widen(const Float16*, __m256i words) { return _mm512_cvtph_ps(words); }
inline F widen(const BFloat16*, __m256i words) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline F widen(const int8_t*, __m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
inline F widen(const Float8E5M2*, __m128i bytes) {  // e5m2 is the upper byte of a half
    return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
}
inline F with_nan(M nan, F x) {  // the sign stays
    return _mm512_mask_or_ps(x, nan, x, set1(__builtin_nanf("")));
}
inline F widen(const Float8E4M3*, __m128i bytes) {  // moved into a half: 2^-8 of the value
    const __m256i half =
        _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(short(0xbf80)));
    const __m128i magnitude = _mm_and_si128(bytes, _mm_set1_epi8(0x7f));
    const M nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
    return with_nan(nan, _mm512_mul_ps(_mm512_cvtph_ps(half), set1(256.0f)));
}

inline F load(const Float16* p) { return widen(p, load_words(p)); }
inline F load(const BFloat16* p) { return widen(p, load_words(p)); }
inline F load(const int8_t* p) { return widen(p, load_bytes(p)); }
inline F load(const Float8E5M2* p) { return widen(p, load_bytes(p)); }
inline F load(const Float8E4M3* p) { return widen(p, load_bytes(p)); }

// The first n elements, 0 for the rest; nothing beyond them is touched.
inline M first(int n) { return n >= kLanes ? M(0xffff) : M((1u << n) - 1); }
template <class T>
inline F load_some(const T* p, int n) {
    if constexpr (sizeof(T) == 4) {
        return _mm512_maskz_loadu_ps(first(n), p);
    } else if constexpr (sizeof(T) == 2) {
        return widen(p, _mm256_maskz_loadu_epi16(first(n), p));
    } else {
        return widen(p, _mm_maskz_loadu_epi8(first(n), p));
    }
}

inline void store_bytes(void* p, __m512i lanes) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(lanes));
}
inline void store(Float16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m256i to_bfloat16(F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    const M nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
inline void store(BFloat16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(x)); }
inline void store(int8_t* p, F x) {
    const F kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
    store_bytes(p, _mm512_cvt_roundps_epi32(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// x is NaN or at most the largest finite value; the integer steps are those of the scalar
// definition in simd_scalar.h
template <int kMantissa, int kBias>
inline __m512i to_float8(F x) {
    constexpr int kDrop = 23 - kMantissa;
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(int(0x80000000)));
    const __m512i u = _mm512_xor_si512(bits, sign);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, kDrop), _mm512_set1_epi32(1));
    const __m512i rebias = _mm512_set1_epi32((kBias - 127) * (1 << 23) + (1 << (kDrop - 1)) - 1);
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, rebias), odd), kDrop);
    const __m512i shifter = _mm512_set1_epi32((127 - kBias + 1 + kDrop) << 23);
    const __m512i tiny = _mm512_sub_epi32(
        _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(u), _mm512_castsi512_ps(shifter))), shifter);
    const M is_tiny = _mm512_cmplt_epu32_mask(u, _mm512_set1_epi32((127 - kBias + 1) << 23));
    const M is_nan = _mm512_cmpgt_epu32_mask(u, _mm512_set1_epi32(0x7f800000));
    __m512i y = _mm512_mask_mov_epi32(normal, is_tiny, tiny);
    y = _mm512_or_si512(y, _mm512_srli_epi32(sign, 24));
    return _mm512_mask_mov_epi32(y, is_nan, _mm512_set1_epi32(0x7f));
}
inline void store(Float8E4M3* p, F x) { store_bytes(p, to_float8<3, 7>(x)); }
inline void store(Float8E5M2* p, F x) { store_bytes(p, to_float8<2, 15>(x)); }

template <class T>
inline void store_some(T* p, F x, int n) {
    if (n >= kLanes) return store(p, x);
    if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, first(n), x);
    } else {
        T buffer[kLanes];
        store(buffer, x);
        __builtin_memcpy(p, buffer, n * sizeof(T));
    }
}

// ---- wide loads: one cache line becomes kVecs vectors, in whatever order and scale is cheapest.
// Position i of the vectors holds element source(i); the values are 1 / kFactor of the true ones.

template <class T>
struct Wide {
    static constexpr int kVecs = 1;
    static constexpr float kFactor = 1.0f;
    static void load(const T* p, F* x) { x[0] = ::pagewire::cpu::load(p); }
    static constexpr int source(int i) { return i; }
};

template <>
struct Wide<BFloat16> {  // even elements, then odd ones: a shift and a mask, no widening moves
    static constexpr int kVecs = 2;
    static constexpr float kFactor = 1.0f;
    static void load(const BFloat16* p, F* x) {
        const __m512i words = _mm512_loadu_si512(p);
        x[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        x[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))));
    }
    static constexpr int source(int i) { return i < 16 ? 2 * i : 2 * (i - 16) + 1; }
};

template <>
struct Wide<Float16> {
    static constexpr int kVecs = 2;
    static constexpr float kFactor = 1.0f;
    static void load(const Float16* p, F* x) {
        x[0] = ::pagewire::cpu::load(p);
        x[1] = ::pagewire::cpu::load(p + 16);
    }
    static constexpr int source(int i) { return i; }
};

template <>
struct Wide<int8_t> {
    static constexpr int kVecs = 4;
    static constexpr float kFactor = 1.0f;
    static void load(const int8_t* p, F* x) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) x[u] = ::pagewire::cpu::load(p + 16 * u);
    }
    static constexpr int source(int i) { return i; }
};

inline void widen_halves(__m512i half, F* x) {
    x[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    x[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}
constexpr int even_then_odd(int i) { return i < 32 ? 2 * i : 2 * (i - 32) + 1; }

template <>
struct Wide<Float8E5M2> {
    static constexpr int kVecs = 4;
    static constexpr float kFactor = 1.0f;
    static void load(const Float8E5M2* p, F* x) {
        const __m512i bytes = _mm512_loadu_si512(p);
        widen_halves(_mm512_slli_epi16(bytes, 8), x);
        widen_halves(_mm512_and_si512(bytes, _mm512_set1_epi16(short(0xff00))), x + 2);
    }
    static constexpr int source(int i) { return even_then_odd(i); }
};

template <>
struct Wide<Float8E4M3> {
    static constexpr int kVecs = 4;
    static constexpr float kFactor = 256.0f;
    static void load(const Float8E4M3* p, F* x) {
        const __m512i bytes = _mm512_loadu_si512(p);
        const __m512i keep = _mm512_set1_epi16(short(0xbf80));
        const __m512i all = _mm512_set1_epi16(0x3f80);
        const __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 1), keep);
        const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(bytes, 1), keep);
        widen_halves(even, x);
        widen_halves(odd, x + 2);
        const __m512i low = _mm512_set1_epi8(0x7f);
        if (__builtin_expect(_mm512_cmpeq_epi8_mask(_mm512_and_si512(bytes, low), low) != 0, 0)) {
            const __mmask32 e = _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, all), all);
            const __mmask32 o = _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, all), all);
            x[0] = with_nan(M(e), x[0]);
            x[1] = with_nan(M(e >> 16), x[1]);
            x[2] = with_nan(M(o), x[2]);
            x[3] = with_nan(M(o >> 16), x[3]);
        }
    }
    static constexpr int source(int i) { return even_then_odd(i); }
};
