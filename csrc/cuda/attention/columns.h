// A step of a warp that multiplies: kStepKeys keys against kRows rows. K is the tensor core's operand of 16 rows (keys),
// the queries its 8 columns; then V's columns are the 16 rows, and the weights the 8 columns. A thread's logits are of keys
// g and g + 8 (g = lane / 4) and rows 2t and 2t + 1 (t = lane % 4).
#pragma once

#include "cuda/attention/queries.h"
#include "cuda/attention/shape_sm90.h"
#include "cuda/attention/softmax.h"

namespace pagewire {

// The largest weight is left to grow so far above 1 before out is rescaled; in fp16 weights then begin at 2^7.
constexpr float kSlack = 8.0f;

template <class S>
struct Columns {
    float base[S::kRowTiles][2], sum[S::kRowTiles][2];  // weights are 2^(logit - base); the sums stay per thread
    float out[S::kColumnTiles][S::kRowTiles][4];        // columns g, g + 8 x rows 2t, 2t + 1: see column_of_tile
};

template <class S>
PW_DEVICE Columns<S> empty_columns() {
    Columns<S> state{};
    PW_UNROLL
    for (int n = 0; n < S::kRowTiles; ++n) state.base[n][0] = state.base[n][1] = -infinity();
    return state;
}

// The queries as the tensor core's columns: of 16 columns of q, elements 2t, 2t + 1 and 2t + 8, 2t + 9 of row g.
template <class S>
struct QueryColumns {
    uint32_t b[S::kQInRegisters ? S::kColumnTiles : 1][S::kRowTiles][2];
};

template <class S>
PW_DEVICE void load_query_columns(uint32_t (&b)[2][2], const char* rows, int row_tile, int first_chunk) {
    const int lane = thread_index() % 32;
    uint32_t four[4];
    load_matrices(four, rows + swizzle<S::kQRowBytes>(row_tile * 8 + lane % 8, first_chunk + lane / 8));
    b[0][0] = four[0], b[0][1] = four[1], b[1][0] = four[2], b[1][1] = four[3];
}

template <class S>
PW_DEVICE QueryColumns<S> hold_query_columns(const char* rows) {
    QueryColumns<S> q{};
    if constexpr (S::kQInRegisters) {
        PW_UNROLL
        for (int i = 0; i < S::kColumnTiles; i += 2) {
            PW_UNROLL
            for (int n = 0; n < S::kRowTiles; ++n) {
                uint32_t two[2][2];
                load_query_columns<S>(two, rows, n, 2 * i);
                PW_UNROLL
                for (int e = 0; e < 2; ++e) q.b[i][n][e] = two[0][e], q.b[i + 1][n][e] = two[1][e];
            }
        }
    }
    return q;
}

template <class S>
using LogitTile = float[S::kKeyTiles][S::kRowTiles][4];

// x += the products of 16 columns of K, a: keys x columns.
template <class S>
PW_DEVICE void multiply_columns(LogitTile<S>& x, int key_tile, const uint32_t (&a)[4],
                                const uint32_t (&b)[S::kRowTiles][2]) {
    PW_UNROLL
    for (int n = 0; n < S::kRowTiles; ++n) {
        multiply_accumulate_as<typename S::Operand>(x[key_tile][n], a, b[n][0], b[n][1]);
    }
}

template <class S>
PW_DEVICE void multiply_k_rows(const QueryColumns<S>& q, const char* q_rows, const char* k, int first_key,
                               LogitTile<S>& x) {
    using T = typename S::T;
    const int lane = thread_index() % 32;
    PW_UNROLL
    for (int m = 0; m < S::kKeyTiles; ++m) {
        PW_UNROLL
        for (int n = 0; n < S::kRowTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) x[m][n][i] = 0.0f;
        }
    }
    PW_UNROLL
    for (int c = 0; c < S::kColumnTiles; c += 2) {  // 32 columns
        uint32_t b[2][S::kRowTiles][2];
        PW_UNROLL
        for (int n = 0; n < S::kRowTiles; ++n) {
            uint32_t two[2][2];
            if constexpr (!S::kQInRegisters) load_query_columns<S>(two, q_rows, n, 2 * c);
            PW_UNROLL
            for (int i = 0; i < 2; ++i) {
                PW_UNROLL
                for (int e = 0; e < 2; ++e)
                    b[i][n][e] = S::kQInRegisters ? q.b[S::kQInRegisters ? c + i : 0][n][e] : two[i][e];
            }
        }
        PW_UNROLL
        for (int m = 0; m < S::kKeyTiles; ++m) {
            const int key = first_key + 16 * m + lane % 16;
            if constexpr (S::kQuantised) {
                uint32_t r[4];  // keys 0 .. 7 and 8 .. 15 of a chunk of 16 columns, then of the next
                load_matrices(r, k + place_in_panels<S>(key, c + lane / 16));
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const uint32_t a[4] = {widen<0, 1>(r[2 * i], T{}), widen<0, 1>(r[2 * i + 1], T{}),
                                           widen<2, 3>(r[2 * i], T{}), widen<2, 3>(r[2 * i + 1], T{})};
                    multiply_columns<S>(x, m, a, b[i]);
                }
            } else {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    uint32_t a[4];
                    load_matrices(a, k + place_in_panels<S>(key, 2 * (c + i) + lane / 16));
                    multiply_columns<S>(x, m, a, b[i]);
                }
            }
        }
    }
}

// Scaled logits (base 2) to weights, and these to the tensor core's columns. Out is rescaled only when a weight has grown
// by more than 2^kSlack.
template <class S>
PW_DEVICE void weigh_columns(Columns<S>& state, LogitTile<S>& x, uint32_t (&b)[S::kKeyTiles][S::kRowTiles][2]) {
    constexpr float kRoom = kHeadroom<S> > 0.0f ? kHeadroom<S> - kSlack : 0.0f;
    PW_UNROLL
    for (int n = 0; n < S::kRowTiles; ++n) {
        float base[2];
        bool grows = false;
        PW_UNROLL
        for (int e = 0; e < 2; ++e) {
            float largest = -infinity();
            PW_UNROLL
            for (int m = 0; m < S::kKeyTiles; ++m) largest = fmaxf(largest, fmaxf(x[m][n][e], x[m][n][e + 2]));
            PW_UNROLL
            for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
            base[e] = largest - kRoom;
            grows = grows || base[e] > state.base[n][e] + kSlack;
        }
        if (ballot(grows)) {
            PW_UNROLL
            for (int e = 0; e < 2; ++e) {
                base[e] = fmaxf(base[e], state.base[n][e]);
                const float rescale = exp2_fast(state.base[n][e] - (base[e] == -infinity() ? 0.0f : base[e]));
                state.base[n][e] = base[e];
                state.sum[n][e] *= rescale;
                PW_UNROLL
                for (int c = 0; c < S::kColumnTiles; ++c) {
                    state.out[c][n][e] *= rescale;
                    state.out[c][n][e + 2] *= rescale;
                }
            }
        }
        PW_UNROLL
        for (int e = 0; e < 2; ++e) base[e] = state.base[n][e] == -infinity() ? 0.0f : state.base[n][e];
        PW_UNROLL
        for (int m = 0; m < S::kKeyTiles; ++m) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) x[m][n][i] = exp2_fast(x[m][n][i] - base[i % 2]);
            PW_UNROLL
            for (int e = 0; e < 2; ++e) {
                state.sum[n][e] += x[m][n][e] + x[m][n][e + 2];
                b[m][n][e] = transpose_matrix(pack_operands<typename S::Operand>(x[m][n][2 * e], x[m][n][2 * e + 1]));
            }
        }
    }
}

// The column of out[c][...][i < 2], and of [i >= 2] with half = 1.
template <class S>
PW_DEVICE int column_of_tile(int c, int half) {
    const int g = thread_index() % 32 / 4;
    return c * 16 + (S::kQuantised ? 2 * g + half : g + 8 * half);
}

template <class S>
PW_DEVICE void multiply_v_rows(const uint32_t (&b)[S::kKeyTiles][S::kRowTiles][2], const char* v, int first_key,
                               Columns<S>& state) {
    using T = typename S::T;
    const int lane = thread_index() % 32;
    PW_UNROLL
    for (int c = 0; c < S::kColumnTiles; ++c) {
        if constexpr (S::kQuantised) {
            // transposing pairs of bytes gives columns 2g and 2g + 1 of keys 2t and 2t + 1, of 32 keys
            uint32_t r[4];
            load_matrices_transposed(r, v + place_in_panels<S>(first_key + lane, c));
            PW_UNROLL
            for (int m = 0; m < 2; ++m) {
                const uint32_t a[4] = {widen<0, 2>(r[2 * m], T{}), widen<1, 3>(r[2 * m], T{}),
                                       widen<0, 2>(r[2 * m + 1], T{}), widen<1, 3>(r[2 * m + 1], T{})};
                PW_UNROLL
                for (int n = 0; n < S::kRowTiles; ++n) {
                    multiply_accumulate_as<typename S::Operand>(state.out[c][n], a, b[m][n][0], b[m][n][1]);
                }
            }
        } else {
            uint32_t a[4];  // columns 0 .. 7 and 8 .. 15 of keys 0 .. 7, then of keys 8 .. 15
            const int key = first_key + lane % 8 + lane / 16 * 8;
            load_matrices_transposed(a, v + place_in_panels<S>(key, 2 * c + lane / 8 % 2));
            PW_UNROLL
            for (int n = 0; n < S::kRowTiles; ++n) {
                multiply_accumulate_as<typename S::Operand>(state.out[c][n], a, b[0][n][0], b[0][n][1]);
            }
        }
    }
}

// A thread's share of columns first .. first + kExchangeColumns - 1 of its warp's state.
template <class S>
PW_DEVICE void exchange_columns(Exchange<S>& exchange, const Columns<S>& state, int first) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    PW_UNROLL
    for (int n = 0; n < S::kRowTiles; ++n) {
        PW_UNROLL
        for (int e = 0; e < 2; ++e) {
            const int row = warp * S::kRows + 8 * n + lane % 4 * 2 + e;
            float sum = state.sum[n][e];
            PW_UNROLL
            for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
            if (lane < 4) {
                store_shared(&exchange.base[row], state.base[n][e]);
                store_shared(&exchange.sum[row], sum);
            }
            PW_UNROLL
            for (int c = 0; c < S::kColumnTiles; ++c) {
                if (c * 16 / S::kExchangeColumns * S::kExchangeColumns != first) continue;
                PW_UNROLL
                for (int half = 0; half < 2; ++half) {
                    store_shared(&exchange.out[row][column_of_tile<S>(c, half) - first], state.out[c][n][2 * half + e]);
                }
            }
        }
    }
}

}  // namespace pagewire
