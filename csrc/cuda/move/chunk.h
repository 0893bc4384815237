// Consecutive elements of a row, a lane's: as stored, and as fp32. There are 16 of them, all there and aligned to 16
// bytes, or 1.
#pragma once

#include "cuda/device/memory.h"
#include "cuda/words.h"
#include "pagewire/dispatch.h"

namespace pagewire::moving {

// As stored: item_size(dtype) vectors of 16 bytes of it, or an element's bits.
template <int kElements>
struct Chunk {
    uint32_t word[kElements];
};

// item: of the dtype; 0: nothing is there, zeros are.
PW_DEVICE Chunk<16> load_chunk(const char* p, int item, Chunk<16>) {
    Chunk<16> c;
    PW_UNROLL
    for (int v = 0; v < 4; ++v) {
        Vec16 of{};
        if (v < item) of = load_streaming(reinterpret_cast<const Vec16*>(p) + v);
        PW_UNROLL
        for (int i = 0; i < 4; ++i) c.word[4 * v + i] = of.x[i];
    }
    return c;
}
PW_DEVICE Chunk<1> load_chunk(const char* p, int item, Chunk<1>) {
    if (item == 1) return {load_global(reinterpret_cast<const uint8_t*>(p))};
    if (item == 2) return {load_global(reinterpret_cast<const uint16_t*>(p))};
    if (item == 4) return {load_global(reinterpret_cast<const uint32_t*>(p))};
    return {};
}

PW_DEVICE void widen(DType dtype, const Chunk<16>& c, float (&x)[16]) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        PW_UNROLL
        for (int e = 0; e < 16; e += kPerWord<T>) floats_of<T>(c.word[e / kPerWord<T>], x + e);
    });
}
PW_DEVICE void widen(DType dtype, const Chunk<1>& c, float (&x)[1]) {
    with_dtype(dtype, [&](auto tag) {
        float all[kPerWord<typename decltype(tag)::type>];
        floats_of<typename decltype(tag)::type>(c.word[0], all);
        x[0] = all[0];
    });
}

PW_DEVICE void store_as(DType dtype, const float (&x)[16], char* p) {
    with_dtype(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr int kEach = kPerWord<T>;
        PW_UNROLL
        for (int v = 0; v < static_cast<int>(sizeof(T)); ++v) {
            const float* of = x + 4 * kEach * v;
            store_global(reinterpret_cast<Vec16*>(p) + v,
                         Vec16{{word_of<T>(of), word_of<T>(of + kEach), word_of<T>(of + 2 * kEach),
                                word_of<T>(of + 3 * kEach)}});
        }
    });
}
PW_DEVICE void store_as(DType dtype, const float (&x)[1], char* p) {
    with_dtype(dtype, [&](auto tag) {
        typename decltype(tag)::type stored;
        from_float(x[0], stored);
        store_global(reinterpret_cast<decltype(stored)*>(p), stored);
    });
}

}  // namespace pagewire::moving
