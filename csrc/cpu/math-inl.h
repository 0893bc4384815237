// Functions over whole vectors. Included inside the anonymous namespace of a target.

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
inline float infinity() { return __builtin_inff(); }

// 2^x for x <= 0, within 2 ulp; 0 below 2^-149 and for -inf; NaN stays NaN.
inline F exp2_negative(F x) {
    x = max(set1(-200.0f), x);
    const F n = round_even(x);
    const F r = sub(x, n);
    F y = set1(1.535336188319500e-4f);
    y = fma(y, r, set1(1.339887440266574e-3f));
    y = fma(y, r, set1(9.618437357674640e-3f));
    y = fma(y, r, set1(5.550332471162809e-2f));
    y = fma(y, r, set1(2.402264791363012e-1f));
    y = fma(y, r, set1(6.931472028550421e-1f));
    return scale_by_power(fma(y, r, set1(1.0f)), n);
}

// Odd and saturating; below 0.3 by its series, where the exponential form would cancel.
inline F tanh(F x) {
    const F size = abs(x);
    const F e = exp2_negative(mul(size, set1(-2.0f * kLog2E)));
    const F far = div(sub(set1(1.0f), e), add(set1(1.0f), e));
    const F square = mul(x, x);
    F y = set1(62.0f / 2835.0f);
    y = fma(y, square, set1(-17.0f / 315.0f));
    y = fma(y, square, set1(2.0f / 15.0f));
    y = fma(y, square, set1(-1.0f / 3.0f));
    y = fma(mul(y, square), x, x);
    const F signed_far = select(less(x, zero()), sub(zero(), far), far);
    return select(less(size, set1(0.3f)), y, signed_far);
}

inline F lane_index() {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = float(i);
    return load(lanes);
}

template <class T>
inline void load_row(const T* from, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i += kLanes) store_some(to + i, load_some(from + i, int(width - i)), int(width - i));
}

__attribute__((noinline)) inline void load_row(DType dtype, const char* from, int64_t width, float* to) {
    with_dtype(dtype,
               [&](auto tag) { load_row(reinterpret_cast<const typename decltype(tag)::type*>(from), width, to); });
}

// Whether 0 * x is NaN for one of the rows' elements or of their scales, if those are given.
template <class T>
__attribute__((noinline)) bool any_non_finite(const char* const* rows, int num_rows, int64_t byte, int64_t width,
                                              const float* scales) {
    constexpr int kChains = 4;  // an fma waits for the one before it
    F zeros[kChains] = {zero(), zero(), zero(), zero()};
    for (int i = 0; i < num_rows; ++i) {
        const T* row = reinterpret_cast<const T*>(rows[i] + byte);
        if (scales != nullptr) zeros[0] = fma(set1(scales[i]), zero(), zeros[0]);
        int64_t d = 0;
        for (; d + kChains * kLanes <= width; d += kChains * kLanes) {
#pragma GCC unroll 4
            for (int u = 0; u < kChains; ++u) zeros[u] = fma(load(row + d + u * kLanes), zero(), zeros[u]);
        }
        for (; d < width; d += kLanes) zeros[0] = fma(load_some(row + d, int(width - d)), zero(), zeros[0]);
    }
    return sum(add(add(zeros[0], zeros[1]), add(zeros[2], zeros[3]))) != 0.0f;
}

// from[i] * factor
__attribute__((noinline)) inline void store_row(DType dtype, const float* from, float factor, int64_t width, char* to) {
    const F times = set1(factor);
    with_dtype(dtype, [&](auto tag) {
        auto* out = reinterpret_cast<typename decltype(tag)::type*>(to);
        for (int64_t i = 0; i < width; i += kLanes) {
            const int n = int(width - i < kLanes ? width - i : kLanes);
            store_some(out + i, mul(load_some(from + i, n), times), n);
        }
    });
}
