// The attention kernel: decode, and prefill of short queries.
//
// grid: [blocks that fit on the device, 1]; a block walks over its share of all units
// (attention_work.h).
//
// The query heads of a group (times the rows of a short query) are packed to the tensor core's 16
// rows, so every KV byte is read once. Warps take different keys of a tile, each with a softmax
// state of its own and, while there are at most 16 rows, a copy pipeline of its own: no block
// barrier in the main loop. With more rows, warps_m warps take 16 rows each over the same tile in
// shared memory.
//
// Plan (128 threads; 64 for width 256), bytes of K and V in flight = (kStages - 1) * stage:
//   width 64:  4 stages of 16 KiB, 2 blocks on sm_80 (48 KiB in flight each), 3 on sm_90
//   width 128: 3 stages of 32 KiB, 1 block on sm_80 (64 KiB in flight), 2 on sm_90
//   width 256: 3 stages of 32 KiB, 1 block on sm_80 (64 KiB in flight), 2 on sm_90
// With 99 KiB of shared memory (sm_86, sm_89, sm_120): widths 128 and 256 have 2 stages, 1 block, 32 KiB in flight. At
// most 168 registers for width 64, 255 for the others: 3 and 2 blocks. No spills, no local memory.
#pragma once

#include "cuda/attention_merge.h"
#include "cuda/launch.h"

namespace pagewire {

template <class S, class Q, class KV>
struct AttentionBlock : AttentionMerge<S, Q, KV> {
    using Below = AttentionMerge<S, Q, KV>;
    using Below::Below;
    using Below::describe;
    using Below::fetch_page;
    using Below::finish;
    using Below::issue;
    using Below::keep;
    using Below::leave;
    using Below::load_q;
    using Below::load_q_step;
    using Below::next_row;
    using Below::p;
    using Below::report_requests;
    using Below::request_info;
    using Below::rows_of;
    using Below::scratch;
    using Below::scratch64;
    using Below::seek;
    using Below::shared_scale;
    using Below::step;
    using Below::sync_sharers;
    using Below::warp;
    using Below::write_empty_requests;
    using Below::write_empty_row;
    using typename Below::Page;
    using typename Below::Rows;
    using typename Below::State;

    PW_DEVICE void run() {
        work();
        leave();
    }

    PW_DEVICE void work() {
        int64_t total = 0, units = 0,
                after = 0;  // of all requests; of this thread's last; up to and with it
        int rows_end = 0;
        for (int base = 0; base < p.batch_size; base += S::kThreads) {
            describe(base, rows_end, units);
            int64_t sum;
            after = total + scan_sum<S::kThreads>(units, scratch64(), sum);
            total += sum;
            report_requests(base);
            write_empty_requests(base);
        }
        for (int64_t row = rows_end + int64_t(block_x()); row < p.num_tokens; row += grid_x()) {
            write_empty_row(static_cast<int>(row));
        }
        if (total == 0) return;
        const int64_t share = (total + grid_x() - 1) / grid_x();
        const int64_t begin = share * block_x();
        int64_t end = begin + share;
        if (end > total) end = total;
        if (begin >= end) return;

        int base = 0;
        if (p.batch_size > S::kThreads) base = seek(begin, units, after);
        // the one thread whose request unit `begin` belongs to tells the others
        if (after - units <= begin && begin < after) {
            store_shared(scratch64(), after - units);
            store_shared(scratch(), thread_index());
        }
        sync_block();
        const int first = load_shared(scratch());
        int request = base + first, row_begin = load_shared(request_info(first));
        int64_t prefix = load_shared(scratch64());  // units before the request
        RequestWork w = request_work(p, request, row_begin, next_row(row_begin, request), S::kTile);
        for (int64_t unit = begin; unit < end;) {
            while (unit >= prefix + w.total_units(p.num_kv_heads)) {
                prefix += w.total_units(p.num_kv_heads);
                // lengths that change under the kernel must not lead past the batch
                if (++request == p.batch_size) return;
                w = request_work(p, request, w.row_end, next_row(w.row_end, request), S::kTile);
            }
            Segment s;
            Parts parts;
            unit += cut_segment(p, w, request, prefix, unit, end, share, s, parts);
            keep(parts);
            attend(w, s);
        }
    }

    PW_DEVICE void attend(const RequestWork& w, const Segment& s) {
        load_q(w, s);
        sync_block();
        const int m = warp % p.warps_m, key_group = warp / p.warps_m;
        const int num_tiles = (s.key_end - s.key_begin + S::kTile - 1) / S::kTile;

        State state;
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.max[half] = -infinity();
            state.sum[half] = 0.0f;
            state.largest[half] = 0.0f;
        }
        PW_UNROLL
        for (int n = 0; n < S::kColumns; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
        }
        const Rows rows = rows_of(w, s, m);
        const float scale = p.softmax_scale * shared_scale(p.k.scale, s.request, s.head);
        uint32_t q[S::kQInRegisters ? S::kWidth / 16 : 1][4];
        if constexpr (S::kQInRegisters) {
            PW_UNROLL
            for (int step = 0; step < S::kWidth / 16; ++step) load_q_step(q[step], m, step);
        }

        Page at = fetch_page(w, s, 0);
        PW_UNROLL
        for (int i = 0; i < S::kStages - 1; ++i) {
            const Page next = fetch_page(w, s, i + 1);
            issue(s, i, num_tiles, at);
            at = next;
        }
        PW_NO_UNROLL
        for (int i = 0; i < num_tiles; ++i) {
            const Page next = fetch_page(w, s, i + S::kStages);
            wait_copies<S::kStages - 2>();
            sync_sharers();  // tile i is there for its readers, and nobody reads tile i - 1 any more
            issue(s, i + S::kStages - 1, num_tiles, at);
            at = next;
            // with one warp for the rows, its keys are those it copied
            PW_NO_UNROLL
            for (int part = 0; part < p.warps_m; ++part) {
                const int first = key_group * p.warps_m + part;  // in units of kKeys
                step(state, rows, q, i % S::kStages, first, s.key_begin + i * S::kTile + first * S::kKeys, m, scale);
            }
        }
        wait_copies<0>();
        sync_block();
        finish(w, s, state, m, key_group);
        sync_block();
    }
};

template <class Q, class KV, int kWidth, bool kSmall>
PW_KERNEL((Shape<Q, KV, kWidth, kSmall>::kThreads), (Shape<Q, KV, kWidth, kSmall>::kMinBlocks))
void attention_kernel(const AttentionPlan p) {
#if defined(PW_SHARED_MEMORY_IS_LARGE)
    constexpr bool kIsLaunched = !kSmall;  // the rest is not worth its bytes
#else
    constexpr bool kIsLaunched = true;
#endif
    if constexpr (kIsLaunched) AttentionBlock<Shape<Q, KV, kWidth, kSmall>, Q, KV>(p).run();
}

}  // namespace pagewire
