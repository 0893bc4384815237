// The running softmax of 16 rows: one thread's share of a state, rows g and g + 8 (g = lane / 4).
#pragma once

#include "cuda/attention/shape.h"

namespace pagewire {

template <class S>
struct State {
    float base[2], sum[2];      // weights are 2^(logit - base); the sums stay per thread until the end
    float out[S::kColumns][4];  // columns of an 8-wide tile: two of row g, two of row g + 8
    float largest[2];           // weight times V's scale by token so far: see token_weights.h
};

// How far the largest weight lies above 1: fp16 then holds what is up to 2^29 smaller with all its digits.
template <class S>
constexpr float kHeadroom = std::is_same_v<typename S::Operand, Float16> ? 15.0f : 0.0f;

template <class S>
PW_DEVICE State<S> empty_state() {
    State<S> state;
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        state.base[half] = -infinity();
        state.sum[half] = state.largest[half] = 0.0f;
    }
    PW_UNROLL
    for (int n = 0; n < S::kColumns; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
    }
    return state;
}

// Logits (base 2) to weights. `rescale`: what out has to be multiplied by.
template <class S>
PW_DEVICE void weigh(State<S>& state, float (&x)[S::kTiles][4], float (&rescale)[2]) {
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        float largest = -infinity();
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        const float base = fmaxf(state.base[half], largest - kHeadroom<S>);
        // no key seen yet: any finite base keeps exp2(-inf - base) = 0
        const float finite = base == -infinity() ? 0.0f : base;
        rescale[half] = exp2_fast(state.base[half] - finite);
        state.base[half] = base;
        float sum = 0.0f;
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 2; ++i) {
                x[n][2 * half + i] = exp2_fast(x[n][2 * half + i] - finite);
                sum += x[n][2 * half + i];
            }
        }
        state.sum[half] = state.sum[half] * rescale[half] + sum;
    }
}

template <class S>
PW_DEVICE void rescale_out(State<S>& state, const float (&rescale)[2]) {
    if (!ballot(rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
    PW_UNROLL
    for (int n = 0; n < S::kColumns; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) state.out[n][i] *= rescale[i / 2];
    }
}

template <class S>
PW_DEVICE void pack_weights(const float (&x)[S::kTiles][4], uint32_t (&a)[S::kTiles / 2][4]) {
    PW_UNROLL
    for (int step = 0; step < S::kTiles / 2; ++step) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float (&pair)[4] = x[2 * step + i / 2];
            a[step][i] = pack_operands<typename S::Operand>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
    }
}

}  // namespace pagewire
