// The warps' states become one part of an item, and the last of its parts to arrive makes rows of all of them.
#pragma once

#include "cuda/attention/counters.h"
#include "cuda/attention/store.h"

namespace pagewire {

// Merges `count` states of one row in their order; a warp does a row, four columns a lane. sums_of(i): {base, sum} of state
// i, by any lane; out_of(i): its four columns of this lane's.
template <class SumsOf, class OutOf>
PW_DEVICE Sums merge_row(int count, SumsOf sums_of, OutOf out_of) {
    constexpr int kInFlight = 16;
    const int lane = thread_index() % 32;
    Sums all{-infinity(), 0.0f, {}};
    PW_NO_UNROLL
    for (int first = 0; first < count; first += 32) {
        const Sums own = lane < count - first ? sums_of(first + lane) : Sums{-infinity(), 0.0f, {}};
        float largest = fmaxf(all.base, own.base);
        PW_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
        const float base = largest == -infinity() ? 0.0f : largest;
        const float before = exp2_fast(all.base - base), weight = exp2_fast(own.base - base);
        float sum = weight * own.sum;
        PW_UNROLL
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        all.base = largest;
        all.sum = all.sum * before + sum;
        PW_UNROLL
        for (int e = 0; e < 4; ++e) all.out[e] *= before;
        PW_NO_UNROLL
        for (int j = 0; j < std::min(count - first, 32); j += kInFlight) {
            Vec16 part[kInFlight];
            PW_UNROLL
            for (int i = 0; i < kInFlight; ++i) part[i] = first + j + i < count ? out_of(first + j + i) : Vec16{};
            PW_UNROLL
            for (int i = 0; i < kInFlight; ++i) {
                const float w = shuffle(weight, j + i);
                PW_UNROLL
                for (int e = 0; e < 4; ++e) all.out[e] += w * float_from_bits(part[i].x[e]);
            }
        }
    }
    return all;
}

// A row's columns first .. first + 127 of `count` states, to store(column, sums).
template <class SumsOf, class OutOf, class Store>
PW_DEVICE void merge_columns(int count, int first, int width, SumsOf sums_of, OutOf out_of, Store store) {
    const int column = first + thread_index() % 32 * 4;
    const bool has = column < width;
    const Sums x = merge_row(count, sums_of, [&](int i) { return has ? out_of(i, column) : Vec16{}; });
    if (has) store(column, x);
}

// exchange_columns(first): columns first .. first + kExchangeColumns - 1 of the warps' states into `exchange`. What is all of its item goes to out, else to plan.partial,
// and once all parts are there, to out. All threads of the block come here.
template <class S, class ExchangeColumns>
PW_DEVICE void finish(const AttentionPlan& p, const Piece& piece, Exchange<S>& exchange, int* is_last,
                      ExchangeColumns exchange_columns) {
    const int warp = thread_index() / 32, width = static_cast<int>(p.of.out.width), groups = S::kWarps / p.row_warps;
    const int valid = rows_of(p.schedule, piece), row_tile_len = p.schedule.row_tile_len;
    const int base_at = p.part_stride - 4, sum_at = base_at + 1;
    const float v_scale = shared_scale(p.of.v_scale, piece.request, piece.head);
    PW_UNROLL
    for (int first = 0; first < S::kWidth; first += S::kExchangeColumns) {
        if (first >= width) break;
        exchange_columns(first);
        sync_block();
        PW_NO_UNROLL
        for (int row = warp; row < valid; row += S::kThreads / 32) {
            const auto sums_of = [&](int i) {
                const int at = i * row_tile_len + row;
                return Sums{load_shared(&exchange.base[at]), load_shared(&exchange.sum[at]), {}};
            };
            const auto out_of = [&](int i, int column) {
                const float* at = &exchange.out[i * row_tile_len + row][column - first];
                return load_shared(reinterpret_cast<const Vec16*>(at));
            };
            merge_columns(groups, first, width, sums_of, out_of, [&](int column, const Sums& x) {
                if (piece.num_parts == 1) {
                    return store_result(p, query_row(p.schedule, piece, row), v_scale, column, x);
                }
                float* to = p.partial + (piece.own_row + row) * p.part_stride;
                store_global(
                    reinterpret_cast<Vec16*>(to + column),
                    Vec16{{float_bits(x.out[0]), float_bits(x.out[1]), float_bits(x.out[2]), float_bits(x.out[3])}});
                if (column == 0) {
                    store_global(to + base_at, x.base);
                    store_global(to + sum_at, x.sum);
                }
            });
        }
        sync_block();
    }
    if (piece.num_parts == 1 || !is_last_part(p, piece, is_last)) return;
    PW_NO_UNROLL
    for (int row = warp; row < valid; row += S::kThreads / 32) {
        const auto part = [&](int i) { return p.partial + (piece.row_of(i) + row) * p.part_stride; };
        const auto sums_of = [&](int i) {
            return Sums{load_global_fresh(part(i) + base_at), load_global_fresh(part(i) + sum_at), {}};
        };
        const auto out_of = [&](int i, int column) {
            return load_global_fresh(reinterpret_cast<const Vec16*>(part(i) + column));
        };
        PW_NO_UNROLL
        for (int first = 0; first < width; first += 128) {
            merge_columns(piece.num_parts, first, width, sums_of, out_of, [&](int column, const Sums& x) {
                store_result(p, query_row(p.schedule, piece, row), v_scale, column, x);
            });
        }
    }
}

}  // namespace pagewire
