// Finished rows to out and lse.
#pragma once

#include "cuda/attention/mask.h"
#include "cuda/attention/shape.h"

namespace pagewire {

constexpr float kLn2 = 0.6931471805599453f;

// Part of a row: sums of 2^(logit - base), and of these times four columns of V.
struct Sums {
    float base, sum, out[4];
};

// Where a packed row of a piece lies in q, out and lse.
struct QueryRow {
    int row, head;
};
PW_DEVICE QueryRow query_row(const Schedule& s, const Piece& piece, int row) {
    const int packed = piece.row_tile * s.row_tile_len + row, token = packed / s.group_size;
    return {piece.row_begin + token, piece.head * s.group_size + packed - token * s.group_size};
}

template <class Out>
PW_DEVICE void store_four(char* row, int column, int width, bool aligned, const float (&x)[4]) {
    struct alignas(4 * sizeof(Out)) Four {
        Out e[4];
    } four;
    PW_UNROLL
    for (int e = 0; e < 4; ++e) from_float(x[e], four.e[e]);
    Out* to = reinterpret_cast<Out*>(row) + column;
    if (aligned && column + 4 <= width) return store_global(reinterpret_cast<Four*>(to), four);
    PW_UNROLL
    for (int e = 0; e < 4; ++e) {
        if (column + e < width) store_global(to + e, four.e[e]);
    }
}

PW_DEVICE void store_out(const AttentionPlan& p, const QueryRow& at, int column, const float (&x)[4]) {
    const RowsView& out = p.of.out;
    char* row = out.data + (at.row * out.stride_row + at.head * out.stride_head) * item_size(out.dtype);
    const int width = static_cast<int>(out.width);
    switch (out.dtype) {
        case DType::kBFloat16:
            return store_four<BFloat16>(row, column, width, p.out_aligned, x);
        case DType::kFloat16:
            return store_four<Float16>(row, column, width, p.out_aligned, x);
        default:
            return store_four<float>(row, column, width, p.out_aligned, x);
    }
}

PW_DEVICE void store_lse(const AttentionPlan& p, const QueryRow& at, float lse) {
    if (p.of.lse.data == nullptr) return;
    store_global(p.of.lse.data + at.row * p.of.lse.stride_row + at.head * p.of.lse.stride_head, lse);
}

// The sink joins, the sum divides, V's scale multiplies. Empty is a sum of 0; a NaN is not.
PW_DEVICE void store_result(const AttentionPlan& p, const QueryRow& at, float v_scale, int column, Sums x) {
    float shrink = 1.0f;
    if (p.of.sinks.data) {
        const float sink = load_global(p.of.sinks.data + at.head * p.of.sinks.stride_head) * kLog2E;
        const float larger = fmaxf(x.base, sink), base = larger == -infinity() ? 0.0f : larger;
        shrink = exp2_fast(x.base - base);
        // a sink of +inf takes all of the weight
        x.sum = x.sum * shrink + (sink == infinity() ? 1.0f : exp2_fast(sink - base));
        x.base = larger;
    }
    const bool empty = x.sum == 0.0f;
    const float factor = empty ? 0.0f : divide(shrink, x.sum) * v_scale;
    PW_UNROLL
    for (int e = 0; e < 4; ++e) x.out[e] *= factor;
    store_out(p, at, column, x.out);
    if (column == 0) store_lse(p, at, empty ? -infinity() : (x.base + log2_fast(x.sum)) * kLn2);
}

// Rows that see no key.
template <class S>
PW_DEVICE void store_empty(const AttentionPlan& p, const Piece& piece) {
    const int quads = ceil_div(static_cast<int>(p.of.out.width), 4), count = rows_of(p.schedule, piece) * quads;
    for (int i = thread_index(); i < count; i += S::kThreads) {
        const QueryRow at = query_row(p.schedule, piece, i / quads);
        store_out(p, at, i % quads * 4, {0.0f, 0.0f, 0.0f, 0.0f});
        const MatrixView& sinks = p.of.sinks;
        if (i % quads == 0) {
            store_lse(p, at, sinks.data ? load_global(sinks.data + at.head * sinks.stride_head) : -infinity());
        }
    }
}

}  // namespace pagewire
