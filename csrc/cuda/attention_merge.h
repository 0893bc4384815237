// Merging parts: a block writes its part, then one thread counts it in, between two block barriers:
// together they order the part before the count, and the count before the last block's reads, which
// go past L1. The last count sets the counter back for the next launch on the stream.
//
// Blocks agree on the parts of an item because they read the same lengths. Lengths that change
// while a launch runs break that, and would leave counters at a part of their way: every later
// launch would merge too early. So the last block to leave looks at all of them.
#pragma once

#include "cuda/attention_step.h"

namespace pagewire {

template <class S, class Q, class KV>
struct AttentionMerge : AttentionStep<S, Q, KV> {
    using Below = AttentionStep<S, Q, KV>;
    using Below::Below;
    using Below::column_of;
    using Below::lane;
    using Below::out_unit;
    using Below::p;
    using Below::parts;
    using Below::scratch;
    using Below::shared;
    using Below::shared_scale;
    using Below::store_lse;
    using Below::store_out;
    using Below::valid_rows;
    using typename Below::State;

    // For finish(): registers would hold them through all keys.
    PW_DEVICE void keep(const Parts& x) const {
        if (thread_index() != 0) return;
        store_shared(parts(), x.own_row);
        store_shared(parts() + 1, x.first_row);
        store_shared(parts() + 2, x.next_row);
        store_shared(parts() + 3, x.row_step);
        store_shared(parts() + 4, x.counter);
        store_shared(parts() + 5, x.num_parts);
    }
    PW_DEVICE Parts kept() const {
        return {load_shared(parts()),     load_shared(parts() + 1), load_shared(parts() + 2),
                load_shared(parts() + 3), load_shared(parts() + 4), load_shared(parts() + 5)};
    }

    // The warps' states become one part; a part that is not all of its item waits in memory for the others.
    PW_DEVICE void finish(const RequestWork& w, const Segment& s, State& state, int m, int key_group) {
        float* outs = reinterpret_cast<float*>(shared + S::kStageOffset);  // [kWarps * 16][kOutStride]
        float* maxima = outs + S::kWarps * 16 * S::kOutStride;             // [kWarps * 16]
        float* sums = maxima + S::kWarps * 16;
        static_assert((S::kWarps * 16 * (S::kOutStride + 2)) * 4 <= S::kStages * S::kStageBytes,
                      "the exchanged states fit into the stages");
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.sum[half] += shuffle_xor(state.sum[half], 1);
            state.sum[half] += shuffle_xor(state.sum[half], 2);
            // rows of the block, key group after key group
            const int row = (key_group * p.warps_m + m) * 16 + lane / 4 + 8 * half;
            if (lane % 4 == 0) {
                store_shared(maxima + row, state.max[half]);
                store_shared(sums + row, state.sum[half]);
            }
            const float unit = out_unit(state, half);
            PW_UNROLL
            for (int n = 0; n < S::kColumns; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    store_shared(outs + row * S::kOutStride + column_of(n, i), state.out[n][2 * half + i] * unit);
                }
            }
        }
        sync_block();
        const float v_scale = shared_scale(p.v.scale, s.request, s.head);
        const int valid = valid_rows(w, s), groups = S::kWarps / p.warps_m;
        const auto part_max = [&](int row, int i) { return load_shared(maxima + i * p.chunk_rows + row); };
        const auto part_sum = [&](int row, int i) { return load_shared(sums + i * p.chunk_rows + row); };
        const auto part_out = [&](int row, int i, int column, float (&x)[4]) {
            const float* from = outs + (i * p.chunk_rows + row) * S::kOutStride + column;
            PW_UNROLL
            for (int e = 0; e < 4; ++e) x[e] = load_shared(from + e);
        };
        const Parts at = kept();
        if (at.num_parts == 1) {
            merge_rows(valid, groups, part_max, part_sum, part_out,
                       [&](int row, int column, float max, float sum, const float (&x)[4]) {
                           store_result(w, s, row, column, v_scale, max, sum, x);
                       });
            return;
        }
        const int num_parts = static_cast<int>(at.num_parts);
        const int max_at = p.part_stride - 4, sum_at = max_at + 1;
        merge_rows(valid, groups, part_max, part_sum, part_out,
                   [&](int row, int column, float max, float sum, const float (&x)[4]) {
                       float* to = p.partial + (at.own_row + row) * p.part_stride;
                       store_global(reinterpret_cast<Vec16*>(to + column),
                                    Vec16{{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}});
                       if (column == 0) {
                           store_global(to + max_at, max);
                           store_global(to + sum_at, sum);
                       }
                   });
        sync_block();
        if (thread_index() == 0) {
            const int last = num_parts - 1;
            store_shared(scratch(), count_up_to(p.counters + at.counter, last) == last ? 1 : 0);
        }
        sync_block();
        if (!load_shared(scratch())) return;
        const auto part = [&](int row, int i) { return p.partial + (at.row_of(i) + row) * p.part_stride; };
        merge_rows(
            valid, num_parts, [&](int row, int i) { return load_global_fresh(part(row, i) + max_at); },
            [&](int row, int i) { return load_global_fresh(part(row, i) + sum_at); },
            [&](int row, int i, int column, float (&x)[4]) {
                const Vec16 four = load_global_fresh(reinterpret_cast<const Vec16*>(part(row, i) + column));
                PW_UNROLL
                for (int e = 0; e < 4; ++e) x[e] = float_from_bits(four.x[e]);
            },
            [&](int row, int column, float max, float sum, const float (&x)[4]) {
                store_result(w, s, row, column, v_scale, max, sum, x);
            });
    }

    // The last block of the launch to come here has all counts behind it: every counter is back at
    // zero, or is recorded and set back.
    PW_DEVICE void leave() const {
        if (p.num_counters == 0 || thread_index() >= 32) return;
        const int last = static_cast<int>(grid_x()) - 1;
        int is_last = 0;
        if (lane == 0) is_last = count_up_to(p.blocks_done, last) == last ? 1 : 0;
        if (!shuffle(is_last, 0)) return;
        sync_warp();
        int left = 0;  // one pass that only loads: 16 are on their way at once
        for (int first = lane; first < p.num_counters; first += 16 * 32) {
            PW_UNROLL
            for (int j = 0; j < 16; ++j) {
                const int i = first + 32 * j;
                if (i < p.num_counters) left |= load_global_fresh(p.counters + i);
            }
        }
        if (left == 0) return;
        for (int i = lane; i < p.num_counters; i += 32) {
            if (load_global_fresh(p.counters + i) == 0) continue;
            store_global(p.counters + i, 0);
            record_error(p.error_word, p.cu_seqlens_q ? ErrorKind::kPrefillCounter : ErrorKind::kDecodeCounter, 0, i);
        }
    }

    // Merges `count` states of each row in their order, four columns a thread.
    template <class Max, class Sum, class Out, class Store>
    PW_DEVICE void merge_rows(int valid, int count, Max max_of, Sum sum_of, Out out_of, Store store) const {
        const int quads = (p.v.width + 3) / 4;
        for (int i = thread_index(); i < valid * quads; i += S::kThreads) {
            const int row = i / quads, column = i % quads * 4;
            float largest = -infinity();
            PW_UNROLL_BY(4)
            for (int j = 0; j < count; ++j) largest = fmaxf(largest, max_of(row, j));
            const float base = largest == -infinity() ? 0.0f : largest;
            float sum = 0.0f, x[4] = {};
            PW_UNROLL_BY(4)
            for (int j = 0; j < count; ++j) {
                const float weight = exp2_fast(max_of(row, j) - base);
                float part[4];
                out_of(row, j, column, part);
                sum += weight * sum_of(row, j);
                PW_UNROLL
                for (int e = 0; e < 4; ++e) x[e] += weight * part[e];
            }
            store(row, column, largest, sum, x);
        }
    }

    // The sink joins, the sum divides, V's scale multiplies. Empty is a sum of 0; a NaN is not.
    PW_DEVICE void store_result(const RequestWork& w, const Segment& s, int row, int column, float v_scale, float max,
                                float sum, const float (&x)[4]) const {
        const int packed = s.chunk * p.chunk_rows + row;
        const int q_row = w.row_begin + packed / p.group_size;
        const int head = s.head * p.group_size + packed % p.group_size;
        float shrink = 1.0f;
        if (p.sinks) {
            const float sink = load_global(p.sinks + head * p.sinks_stride) * kLog2E;
            const float larger = fmaxf(max, sink), base = larger == -infinity() ? 0.0f : larger;
            shrink = exp2_fast(max - base);
            // a sink of +inf takes all of the weight
            sum = sum * shrink + (sink == infinity() ? 1.0f : exp2_fast(sink - base));
            max = larger;
        }
        const bool empty = sum == 0.0f;
        const float factor = empty ? 0.0f : divide(shrink, sum) * v_scale;
        PW_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column + e < p.v.width) store_out(q_row, head, column + e, x[e] * factor);
        }
        if (column == 0 && p.lse) {
            store_lse(q_row, head, empty ? -infinity() : (max + log2_fast(sum)) * kLn2);
        }
    }
};

}  // namespace pagewire
