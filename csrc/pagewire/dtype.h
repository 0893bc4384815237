// Element types of q, the cache and the wire. Storage only: arithmetic is fp32 in registers.
#pragma once

#include <cstdint>

namespace pagewire {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat8E4M3, kFloat8E5M2, kInt8 };

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};
struct Float8E4M3 {
    uint8_t bits;
};
struct Float8E5M2 {
    uint8_t bits;
};

constexpr int64_t item_size(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2 : 1;
}

constexpr bool is_quantised(DType dtype) { return item_size(dtype) == 1; }

// Largest finite stored value of a quantised dtype; int8 is symmetric.
template <class T>
struct QuantMax {
    static constexpr float value = 0.0f;  // not quantised
};
template <>
struct QuantMax<Float8E4M3> {
    static constexpr float value = 448.0f;
};
template <>
struct QuantMax<Float8E5M2> {
    static constexpr float value = 57344.0f;
};
template <>
struct QuantMax<int8_t> {
    static constexpr float value = 127.0f;
};

constexpr float quant_max(DType dtype) {
    return dtype == DType::kFloat8E4M3   ? QuantMax<Float8E4M3>::value
           : dtype == DType::kFloat8E5M2 ? QuantMax<Float8E5M2>::value
           : dtype == DType::kInt8       ? QuantMax<int8_t>::value
                                         : 0.0f;
}

}  // namespace pagewire
