// Infinite and NaN values of V: 0 * inf would reach every row of a tensor core step, so where a row does not see all keys
// they are added to the sums of the rows that see them, and are zero for the tensor core. A weight above 0 does not
// change them.
#pragma once

#include "cuda/attention/mask.h"
#include "cuda/attention/softmax.h"

namespace pagewire {

// A stored value is infinite or NaN if its bits under kMask are all ones: kLowest then carries into the sign's place.
template <class T>
struct NonFinite {
    static constexpr uint32_t kMask = 0, kLowest = 0;  // int8_t: never
};
template <>
struct NonFinite<Float16> {
    static constexpr uint32_t kMask = 0x7c007c00, kLowest = 0x04000400;
};
template <>
struct NonFinite<BFloat16> {
    static constexpr uint32_t kMask = 0x7f807f80, kLowest = 0x00800080;
};
template <>
struct NonFinite<Float8E4M3> {
    static constexpr uint32_t kMask = 0x7f7f7f7f, kLowest = 0x01010101;
};
template <>
struct NonFinite<Float8E5M2> {
    static constexpr uint32_t kMask = 0x7c7c7c7c, kLowest = 0x04040404;
};

// One bit, at the sign's place, for each of the word's elements that is not finite.
template <class T>
PW_DEVICE uint32_t non_finite(uint32_t word) {
    constexpr uint32_t kSigns = sizeof(T) == 1 ? 0x80808080 : 0x80008000;
    return ((word & NonFinite<T>::kMask) + NonFinite<T>::kLowest) & kSigns;
}
// The word with zeros in their place.
template <class T>
PW_DEVICE uint32_t finite_only(uint32_t word) {
    const uint32_t found = non_finite<T>(word);
    return word & ~(sizeof(T) == 1 ? (found >> 7) * 0xff : (found >> 15) * 0xffff);
}
template <class T>
PW_DEVICE void clean(uint32_t (&words)[4]) {
    PW_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = finite_only<T>(words[i]);
}

// All bits of the word's elements but their signs.
template <class T>
PW_DEVICE uint32_t magnitudes() {
    return NonFinite<T>::kMask == 0 ? 0xffffffff : sizeof(T) == 1 ? 0x7f7f7f7f : 0x7fff7fff;
}

// The column of out[n][i], and of out[n][i + 2].
template <class S>
PW_DEVICE int column_of(int n, int i) {
    const int column = thread_index() % 4 * 2 + i;
    if constexpr (S::kQuantised) return n / 2 * 16 + 2 * column + n % 2;
    return n * 8 + column;
}

// In V of a step's keys.
template <class S>
PW_DEVICE bool has_non_finite(const Shared<S>& shared, int stage, int step, int row_bytes) {
    uint32_t found = 0;
    PW_UNROLL_BY(2)
    for (int j = thread_index() % 32; j < S::kStepKeys * S::kRowChunks; j += 32) {
        const int row = step * S::kStepKeys + j / S::kRowChunks, chunk = j % S::kRowChunks;
        if (chunk * 16 >= row_bytes) continue;
        const char* at = shared.tiles.stage[stage].v + swizzle<S::kRowBytes>(row, chunk);
        const Vec16 four = load_shared(reinterpret_cast<const Vec16*>(at));
        PW_UNROLL
        for (int i = 0; i < 4; ++i) found |= non_finite<typename S::T>(four.x[i]);
    }
    return ballot(found != 0) != 0;
}

// `word`: the elements of a chunk of V that column_of gives this thread.
template <class S>
PW_DEVICE void add_word(State<S>& state, const Rows& rows, int chunk, int key, uint32_t word, float scale) {
    using T = typename S::T;
    constexpr int kBits = 8 * static_cast<int>(sizeof(T)), kCount = 4 / static_cast<int>(sizeof(T));
    const uint32_t found = is_finite(scale) ? non_finite<T>(word) : ~0u;
    if (found == 0) return;
    PW_UNROLL
    for (int e = 0; e < kCount; ++e) {
        if (!(found >> (kBits * (e + 1) - 1) & 1)) continue;
        T element;
        element.bits = static_cast<decltype(element.bits)>(word >> kBits * e);
        const float y = to_float(element) * scale;
        const int n = S::kQuantised ? 2 * chunk + e % 2 : chunk, i = S::kQuantised ? e / 2 : e;
        if (rows.sees(0, key)) state.out[n][i] += y;
        if (rows.sees(1, key)) state.out[n][i + 2] += y;
    }
}

template <class S>
PW_DEVICE void add_non_finite(const AttentionPlan& p, State<S>& state, const Rows& rows, const Shared<S>& shared,
                              int stage, int step, int first_key) {
    const bool by_token = p.of.v_scale.kind == ScaleKind::kTokenHead;
    PW_UNROLL
    for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
        if (chunk * 16 >= p.of.v.width * static_cast<int>(sizeof(typename S::T))) break;
        PW_NO_UNROLL
        for (int inside = 0; inside < S::kStepKeys; ++inside) {
            const int key = step * S::kStepKeys + inside;
            const char* at = shared.tiles.stage[stage].v + swizzle<S::kRowBytes>(key, chunk) + thread_index() % 4 * 4;
            const float scale = by_token ? load_shared(&shared.token_scale[stage][1][key]) : 1.0f;
            add_word(state, rows, chunk, first_key + inside, load_shared(reinterpret_cast<const uint32_t*>(at)), scale);
        }
    }
}

}  // namespace pagewire
