// Tensor maps: what the TMA is told about a tensor, made on the host and handed to a kernel as a parameter.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device/tma.h"
#include "cuda/launch.h"

namespace pagewire {

// Four dimensions, innermost first.
struct TensorTiling {
    const void* base;
    int element_bytes;               // 1 or 2
    std::array<int64_t, 4> dims;     // elements
    std::array<int64_t, 3> strides;  // bytes, of dimensions 1 to 3
    std::array<int64_t, 4> box;      // elements; a row of it, box[0], is 32, 64 or 128 bytes, and so is its swizzle
};

// Why no map can be made, or an empty string. The driver has the same rules and only says "invalid argument"; that a row
// fills its swizzle is ours, since a narrower one would be padded to it.
inline std::string refusal(const TensorTiling& t) {
    constexpr int64_t kMaxDim = int64_t(1) << 32, kMaxStride = int64_t(1) << 40, kMaxBox = 256;
    if (t.element_bytes != 1 && t.element_bytes != 2) {
        return "elements of " + std::to_string(t.element_bytes) + " bytes, expected 1 or 2";
    }
    if (reinterpret_cast<uintptr_t>(t.base) % 16) return "its base is not aligned to 16 bytes";
    for (int64_t dim : t.dims) {
        if (dim < 1 || dim > kMaxDim) return "a dimension of " + std::to_string(dim) + ", expected 1 to 2^32";
    }
    for (int64_t stride : t.strides) {
        if (stride < 0 || stride >= kMaxStride || stride % 16) {
            return "a stride of " + std::to_string(stride) + " bytes, expected a multiple of 16 below 2^40";
        }
    }
    for (int64_t length : t.box) {
        if (length < 1 || length > kMaxBox) return "a box of " + std::to_string(length) + ", expected 1 to 256";
    }
    const int64_t row = t.box[0] * t.element_bytes;
    if (row != 32 && row != 64 && row != 128) {
        return "a box with rows of " + std::to_string(row) + " bytes, expected 32, 64 or 128";
    }
    if (runtime::architecture() < 90) {
        return "sm_" + std::to_string(runtime::architecture()) + " has no tensor memory accelerator";
    }
    return {};
}

// Throws std::runtime_error for what refusal() names.
inline TensorMap encode_tensor_map(const TensorTiling& t) {
    if (const std::string why = refusal(t); !why.empty()) throw std::runtime_error("pagewire: tensor map: " + why);
    const int64_t row = t.box[0] * t.element_bytes;
    TensorMap map{};
#if defined(PAGEWIRE_EMULATE)
    (void)row;
    map.base = static_cast<const char*>(t.base);
    map.element_bytes = static_cast<uint32_t>(t.element_bytes);
    map.encoded = TensorMap::kEncoded;
    for (size_t i = 0; i < 4; ++i) {
        map.dims[i] = static_cast<uint64_t>(t.dims[i]);
        map.strides[i] = static_cast<uint64_t>(i == 0 ? t.element_bytes : t.strides[i - 1]);
        map.box[i] = static_cast<uint32_t>(t.box[i]);
    }
#else
    cuuint64_t dims[4], strides[3];
    cuuint32_t box[4], every[4] = {1, 1, 1, 1};
    for (size_t i = 0; i < 4; ++i) {
        dims[i] = static_cast<cuuint64_t>(t.dims[i]);
        box[i] = static_cast<cuuint32_t>(t.box[i]);
        if (i < 3) strides[i] = static_cast<cuuint64_t>(t.strides[i]);
    }
    static const auto encode = runtime::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const CUresult result =
        encode(&map, t.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
               const_cast<void*>(t.base), dims, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
               : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : CU_TENSOR_MAP_SWIZZLE_32B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("pagewire: cuTensorMapEncodeTiled: error " + std::to_string(result));
    }
#endif
    return map;
}

}  // namespace pagewire
