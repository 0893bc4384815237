// One step of a warp: kStepKeys keys of a tile against 16 rows; logits, running softmax, weighted sum of V.
#pragma once

#include "cuda/attention/token_weights.h"

namespace pagewire {

// What a warp keeps through all tiles: its 16 rows of q, where registers have room for them, and where this lane's
// matrix rows lie in a tile of K and of V, from a step's first key on.
template <class S>
struct Operands {
    uint32_t a[S::kQInRegisters ? S::kWidth / 16 : 1][4];
    int first_row, k_place, v_place;
};

template <class S>
PW_DEVICE Operands<S> hold_operands(const Shared<S>& shared, int first_row) {
    const int lane = thread_index() % 32;
    Operands<S> q;
    q.first_row = first_row;
    q.k_place = keep(swizzle<S::kRowBytes>(lane % 8, lane / 8));
    q.v_place = keep(S::kQuantised ? swizzle<S::kRowBytes>(lane, 0) : swizzle<S::kRowBytes>(lane % 16, lane / 16));
    if constexpr (S::kQInRegisters) {
        PW_UNROLL
        for (int i = 0; i < S::kWidth / 16; ++i) load_q_step<S>(q.a[i], shared.tiles.q, first_row, i);
    }
    return q;
}

// x[n][i]: rows g (i < 2) and g + 8, key 8n + 2t + i % 2 of the step (g = lane / 4, t = lane % 4).
template <class S, bool kPlain>
PW_DEVICE void multiply_k(const Operands<S>& q, const Shared<S>& shared, int stage, int step, int width,
                          float (&x)[S::kTiles][4]) {
    using Operand = typename S::Operand;
    constexpr int kPerLoad = S::kQuantised ? 4 : 2;  // 16 columns each, of four chunks of a K row
    const char* tiles = shared.tiles.stage[0].k;
    const int keys = stage * static_cast<int>(sizeof(typename Shared<S>::Stage)) + step * S::kStepKeys * S::kRowBytes;
    PW_UNROLL
    for (int n = 0; n < S::kTiles; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
    }
    PW_UNROLL_BY((S::kFewRegisters ? 1 : S::kWidth / 16 / kPerLoad))
    for (int load = 0; load < S::kWidth / 16 / kPerLoad; ++load) {
        if (!kPlain && load * kPerLoad * 16 >= width) break;
        uint32_t a[kPerLoad][4];
        PW_UNROLL
        for (int i = 0; i < kPerLoad; ++i) {
            if constexpr (S::kQInRegisters) {
                PW_UNROLL
                for (int j = 0; j < 4; ++j) a[i][j] = q.a[load * kPerLoad + i][j];
            } else {
                load_q_step<S>(a[i], shared.tiles.q, q.first_row, load * kPerLoad + i);
            }
        }
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) {
            uint32_t b[4];
            load_matrices(b, tiles + step_chunks<S::kRowBytes>(keys + q.k_place, load * 4) + n * 8 * S::kRowBytes);
            PW_UNROLL
            for (int i = 0; i < kPerLoad; ++i) {
                if constexpr (S::kQuantised) {
                    using T = typename S::T;
                    multiply_accumulate_as<Operand>(x[n], a[i], widen<0, 1>(b[i], T{}), widen<2, 3>(b[i], T{}));
                } else {
                    multiply_accumulate_as<Operand>(x[n], a[i], b[2 * i], b[2 * i + 1]);
                }
            }
        }
    }
}

// kClean: elements of V that are not finite count as 0.
template <class S, bool kPlain, bool kClean>
PW_DEVICE void multiply_v(const Operands<S>& q, const uint32_t (&a)[S::kTiles / 2][4], const Shared<S>& shared,
                          int stage, int step, int width, State<S>& state) {
    using Operand = typename S::Operand;
    using T = typename S::T;
    const char* tiles = shared.tiles.stage[0].v;
    const int keys = stage * static_cast<int>(sizeof(typename Shared<S>::Stage)) + step * S::kStepKeys * S::kRowBytes;
    if constexpr (S::kQuantised) {
        // a chunk holds 16 columns; transposing pairs of bytes gives columns 2g and 2g + 1 of keys 2t and 2t + 1
        PW_UNROLL
        for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
            if ((!kPlain || S::kFewRegisters) && chunk * 16 >= width) break;
            uint32_t r[4];
            load_matrices_transposed(r, tiles + step_chunks<S::kRowBytes>(keys + q.v_place, chunk));
            if constexpr (kClean) clean<T>(r);
            PW_UNROLL
            for (int i = 0; i < 2; ++i) {
                multiply_accumulate_as<Operand>(state.out[2 * chunk], a[i], widen<0, 2>(r[2 * i], T{}),
                                                widen<0, 2>(r[2 * i + 1], T{}));
                multiply_accumulate_as<Operand>(state.out[2 * chunk + 1], a[i], widen<1, 3>(r[2 * i], T{}),
                                                widen<1, 3>(r[2 * i + 1], T{}));
            }
        }
    } else {
        PW_UNROLL
        for (int n = 0; n < S::kColumns; n += 2) {
            if (!kPlain && n * 8 >= width) break;
            uint32_t b[4];
            load_matrices_transposed(b, tiles + step_chunks<S::kRowBytes>(keys + q.v_place, n));
            if constexpr (kClean) clean<T>(b);
            multiply_accumulate_as<Operand>(state.out[n], a[0], b[0], b[1]);
            multiply_accumulate_as<Operand>(state.out[n + 1], a[0], b[2], b[3]);
        }
    }
}

// `first_key`: the step's first key in its request.
template <class S, bool kPlain>
PW_DEVICE void attend_step(const AttentionPlan& p, State<S>& state, const Rows& rows, const Operands<S>& q,
                           const Shared<S>& shared, int stage, int step, int first_key) {
    const int k_width = static_cast<int>(p.of.k.width), v_width = static_cast<int>(p.of.v.width);
    float x[S::kTiles][4];
    multiply_k<S, kPlain>(q, shared, stage, step, k_width, x);
    scale_and_mask<S, kPlain>(p, rows, shared, stage, step, first_key, x);
    float rescale[2];
    weigh(state, x, rescale);
    if (p.of.v_scale.kind == ScaleKind::kTokenHead) {
        scale_weights(p, rows, shared, stage, step, first_key, x);
        if constexpr (kLifts<S>) lift_weights(p, state, x, rescale);
    }
    rescale_out(state, rescale);
    uint32_t a[S::kTiles / 2][4];
    pack_weights<S>(x, a);
    if constexpr (NonFinite<typename S::T>::kMask != 0) {
        const int row_bytes = v_width * static_cast<int>(sizeof(typename S::T));
        if (!rows.all_see(first_key, S::kStepKeys) && has_non_finite(shared, stage, step, row_bytes)) {
            add_non_finite(p, state, rows, shared, stage, step, first_key);
            PW_UNROLL
            for (int i = 0; i < S::kTiles / 2; ++i) clean<typename S::Operand>(a[i]);
            return multiply_v<S, kPlain, true>(q, a, shared, stage, step, v_width, state);
        }
    }
    multiply_v<S, kPlain, false>(q, a, shared, stage, step, v_width, state);
}

}  // namespace pagewire
