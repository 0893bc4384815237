// Functions over whole vectors. Included inside the anonymous namespace of a target.

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
inline float infinity() { return __builtin_inff(); }

// 2^x for x <= 0, within 2 ulp; 0 below 2^-149 and for -inf; NaN stays NaN.
inline F exp2_negative(F x) {
    x = max(set1(-200.0f), x);
    const F n = round_even(x), r = sub(x, n);
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
    for (int64_t i = 0; i < width; i += kLanes)
        store_some(to + i, load_some(from + i, int(width - i)), int(width - i));
}

__attribute__((noinline)) inline void load_row(DType dtype, const char* from, int64_t width,
                                               float* to) {
    with_dtype(dtype, [&](auto tag) {
        load_row(reinterpret_cast<const typename decltype(tag)::type*>(from), width, to);
    });
}

// from[i] * factor
__attribute__((noinline)) inline void store_row(DType dtype, const float* from, float factor,
                                                int64_t width, char* to) {
    const F times = set1(factor);
    with_dtype(dtype, [&](auto tag) {
        auto* out = reinterpret_cast<typename decltype(tag)::type*>(to);
        for (int64_t i = 0; i < width; i += kLanes) {
            const int n = int(width - i < kLanes ? width - i : kLanes);
            store_some(out + i, mul(load_some(from + i, n), times), n);
        }
    });
}
