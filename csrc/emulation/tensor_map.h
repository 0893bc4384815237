// A tensor map as the emulation has it, and where its boxes land in shared memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pagewire::emulation {

// As large as the real one, and as aligned.
struct alignas(64) TensorMap {
    static constexpr uint32_t kEncoded = 0x7e4504a9;

    const char* base;
    std::array<uint64_t, 4> dims;     // elements, innermost first
    std::array<uint64_t, 4> strides;  // bytes
    std::array<uint32_t, 4> box;      // elements
    uint32_t element_bytes, encoded;

    bool is_encoded() const { return encoded == kEncoded; }
    size_t row_bytes() const { return size_t(box[0]) * element_bytes; }
    size_t box_bytes() const { return row_bytes() * box[1] * box[2] * box[3]; }
};
static_assert(sizeof(TensorMap) == 128);

// 16-byte chunks change places within a row of 32, 64 or 128 bytes, by the address's 128-byte line.
inline size_t swizzled(size_t address, size_t row_bytes) { return address ^ (address / 128 % (row_bytes / 16)) * 16; }

// The box whose first element is `corner`, to `at` of a block's shared memory; elements outside the tensor are zeros.
inline void land_box(const TensorMap& map, const std::array<int, 4>& corner, char* shared, size_t at) {
    const auto inside = [&](size_t dim, uint32_t i) {
        // below 0 is a large number
        return static_cast<uint64_t>(int64_t(corner[dim]) + i) < map.dims[dim];
    };
    const auto offset = [&](size_t dim, uint32_t i) {
        return (int64_t(corner[dim]) + i) * static_cast<int64_t>(map.strides[dim]);
    };
    const uint32_t chunk = 16 / map.element_bytes;
    for (uint32_t l = 0; l < map.box[3]; ++l) {
        for (uint32_t k = 0; k < map.box[2]; ++k) {
            for (uint32_t j = 0; j < map.box[1]; ++j) {
                const bool row_inside = inside(3, l) && inside(2, k) && inside(1, j);
                for (uint32_t i = 0; i < map.box[0]; i += chunk, at += 16) {
                    char* to = shared + swizzled(at, map.row_bytes());
                    std::memset(to, 0, 16);
                    for (uint32_t e = 0; row_inside && e < chunk; ++e) {
                        if (!inside(0, i + e)) continue;
                        std::memcpy(to + e * map.element_bytes,
                                    map.base + offset(3, l) + offset(2, k) + offset(1, j) + offset(0, i + e),
                                    map.element_bytes);
                    }
                }
            }
        }
    }
}

}  // namespace pagewire::emulation
