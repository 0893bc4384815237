// V's scales by token multiply the weights before the tensor core sees them; fp16 weights are kept in fp16's range.
#pragma once

#include "cuda/attention/mask.h"
#include "cuda/attention/non_finite.h"
#include "cuda/attention/queries.h"
#include "cuda/attention/softmax.h"

namespace pagewire {

template <class S>
constexpr bool kLifts = std::is_same_v<typename S::Operand, Float16>;

// The step's keys, a bit each, that have scale 1 because their values are all zero: such a scale need not be near the
// others', and says nothing of how far weights are to be lifted.
template <class S>
PW_DEVICE uint32_t empty_values(const Shared<S>& shared, int stage, int step, int row_bytes) {
    const int key = step * S::kStepKeys + thread_index() % S::kStepKeys;
    bool empty = load_shared(&shared.token_scale[stage][1][key]) == 1.0f;
    if (!ballot(empty)) return 0;
    PW_NO_UNROLL
    for (int chunk = 0; chunk * 16 < row_bytes; ++chunk) {
        const char* at = shared.tiles.stage[stage].v + swizzle<S::kRowBytes>(key, chunk);
        const Vec16 four = load_shared(reinterpret_cast<const Vec16*>(at));
        PW_UNROLL
        for (int i = 0; i < 4; ++i) empty = empty && (four.x[i] & magnitudes<typename S::T>()) == 0;
    }
    return ballot(empty);
}

template <class S>
PW_DEVICE void scale_weights(const AttentionPlan& p, const Rows& rows, const Shared<S>& shared, int stage, int step,
                             int first_key, float (&x)[S::kTiles][4]) {
    const int row_bytes = static_cast<int>(p.of.v.width) * static_cast<int>(sizeof(typename S::T));
    const uint32_t empty = kLifts<S> ? empty_values(shared, stage, step, row_bytes) : 0;
    PW_UNROLL
    for (int n = 0; n < S::kTiles; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int inside = n * 8 + thread_index() % 4 * 2 + i % 2;
            const float scale = load_shared(&shared.token_scale[stage][1][step * S::kStepKeys + inside]);
            // a key that is not visible may have any scale, NaN too; one that is counts, whatever its weight, but in
            // 16-bit caches, whose kernels for 256 columns have no register left for it
            bool none = x[n][i] == 0.0f;
            if (S::kQuantised && none && !is_finite(scale)) none = !rows.sees(i / 2, first_key + inside);
            x[n][i] = none || (empty >> inside & 1) ? 0.0f : x[n][i] * scale;
        }
    }
}

// What 1 in a row's out stands for.
template <class S>
PW_DEVICE float out_unit(const AttentionPlan& p, const State<S>& state, int half) {
    if (!kLifts<S> || p.of.v_scale.kind != ScaleKind::kTokenHead) return 1.0f;
    return power_of_two(-lift_exponent(state.largest[half]));
}

// Brings a row's scaled weights to below 2^15 by a power of two that follows the largest of them, shrunk as the sums are;
// weights that lie too far below lose their digits. The sums of out change their unit with it.
template <class S>
PW_DEVICE void lift_weights(const AttentionPlan& p, State<S>& state, float (&x)[S::kTiles][4], float (&rescale)[2]) {
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        float largest = state.largest[half] * rescale[half];
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 2; ++i) {
                const float y = x[n][2 * half + i];
                largest = fmaxf(largest, is_finite(y) ? fabsf(y) : 0.0f);
            }
        }
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        const float lift = power_of_two(lift_exponent(largest));
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 2; ++i) x[n][2 * half + i] *= lift;
        }
        rescale[half] = rescale[half] * lift * out_unit(p, state, half);
        state.largest[half] = largest;
    }
}

}  // namespace pagewire
