// From run-time values to template arguments, without macros. constexpr: nvcc then takes them in device code too.
#pragma once

#include "pagewire/dtype.h"

namespace pagewire {

template <class T>
struct Tag {
    using type = T;
};

// Calls f(Tag<T>{}) with the storage type of `dtype`.
template <class F>
constexpr void with_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::kFloat16:
            return f(Tag<Float16>{});
        case DType::kBFloat16:
            return f(Tag<BFloat16>{});
        case DType::kFloat32:
            return f(Tag<float>{});
        case DType::kFloat8E4M3:
            return f(Tag<Float8E4M3>{});
        case DType::kFloat8E5M2:
            return f(Tag<Float8E5M2>{});
        case DType::kInt8:
            return f(Tag<int8_t>{});
    }
}

template <int N>
struct Constant {
    static constexpr int value = N;
    constexpr operator int() const { return N; }
};

// Calls f(Constant<N>{}) for the N equal to `value`; false if none is.
template <int... Ns, class F>
constexpr bool with_constant(int value, F f) {
    return ((value == Ns ? (f(Constant<Ns>{}), true) : false) || ...);
}

}  // namespace pagewire
