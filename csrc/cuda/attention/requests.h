// Which piece a block does next. One warp walks for its block: lengths that change under a launch must not lead the
// block's warps to different barriers.
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/device/memory.h"
#include "cuda/device/thread.h"
#include "cuda/error_word.h"

namespace pagewire {

// Requests in a row, and what lies before the first: rows of q, and units.
struct Range {
    int first, count;
    int row_begin, prefix;
};

// A block's way through its units; between pieces it lies in shared memory.
struct alignas(64) Walk {
    int unit, end, share;  // end == unit: done
    int request, prefix;
    RequestWork work;
};

// The rows behind the last request's are a request too.
PW_DEVICE int num_requests(const AttentionPlan& p) { return p.decodes ? p.batch_size : p.batch_size + 1; }

// Where the rows of a request end, forced into the tensor.
PW_DEVICE int row_end_of(const AttentionPlan& p, int request) {
    if (p.decodes) return request + 1;
    if (request == p.batch_size) return p.num_tokens;
    const auto* offsets = static_cast<const int32_t*>(p.of.cu_seqlens_q.data);
    return clamp(load_global(offsets + request + 1), 0, p.num_tokens);
}

// `row_begin`: the largest row offset up to the request's own.
PW_DEVICE RequestWork work_of(const AttentionPlan& p, int request, int row_begin) {
    const auto* lens = static_cast<const int32_t*>(p.of.seq_lens.data);
    const int seq_len = request < p.batch_size ? load_global(lens + request * p.of.seq_lens.stride) : 0;
    return request_work(p.schedule, row_begin, row_end_of(p, request), seq_len);
}

PW_DEVICE void report_request(const AttentionPlan& p, int request, const RequestWork& w) {
    if (request == p.batch_size) return;
    if (w.bad_seq_len) {
        record_error(p.error_word, p.decodes ? ErrorKind::kDecodeSeqLen : ErrorKind::kPrefillSeqLen, request, 0);
    }
    if (p.decodes) return;
    if (w.too_long) record_error(p.error_word, ErrorKind::kPrefillMaxQLen, request, 0);
    const auto* offsets = static_cast<const int32_t*>(p.of.cu_seqlens_q.data);
    const int end = load_global(offsets + request + 1), before = request == 0 ? 0 : load_global(offsets + request);
    if (end < before || end < 0 || end > p.num_tokens) {
        record_error(p.error_word, ErrorKind::kPrefillCuSeqlensQ, request + 1, 0);
    }
}

// Shares a range out to the lanes of a warp. `units`: of this lane's requests.
PW_DEVICE Range lane_range(const AttentionPlan& p, const Range& of, bool reports, int& units) {
    const int lane = thread_index() % 32, each = ceil_div(of.count, 32);
    Range own{};
    own.first = of.first + clamp(lane * each, 0, of.count);
    own.count = clamp(of.first + of.count - own.first, 0, each);
    own.row_begin = own.first;
    if (!p.decodes) {  // rows begin where the largest earlier offset ends
        int largest = of.row_begin;
        for (int i = 0; i < own.count; ++i) largest = std::max(largest, row_end_of(p, own.first + i));
        PW_UNROLL
        for (int delta = 1; delta < 32; delta *= 2) {
            const int before = shuffle_up(largest, delta);
            if (lane >= delta) largest = std::max(largest, before);
        }
        const int before = shuffle_up(largest, 1);
        own.row_begin = lane == 0 ? of.row_begin : before;
    }
    units = 0;
    int row = own.row_begin;
    for (int i = 0; i < own.count; ++i) {
        const RequestWork w = work_of(p, own.first + i, row);
        units += w.units_of_head() * p.schedule.num_kv_heads;
        if (reports) report_request(p, own.first + i, w);
        row = w.row_end;
    }
    int after = units;
    PW_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
        const int before = shuffle_up(after, delta);
        if (lane >= delta) after += before;
    }
    own.prefix = of.prefix + after - units;
    return own;
}

// What a block needs first once it knows its request: asked for before, of the request that it would have if all had the
// same length. By one warp.
PW_DEVICE void prefetch_likely(const AttentionPlan& p) {
    const int lane = thread_index() % 32, request = static_cast<int>(uint64_t(block_x()) * p.batch_size / grid_x());
    const PageTableView& table = p.of.page_table;
    if (lane * 32 < table.max_pages_per_seq) prefetch_global(table.data + request * table.stride_row + lane * 32);
    const int64_t row_bytes = p.of.q.num_heads * p.of.q.stride_head * 2;
    if (p.decodes && lane * 128 < row_bytes)
        prefetch_global(p.of.q.data + request * p.of.q.stride_row * 2 + lane * 128);
}

// To the first unit of this block; all 32 lanes of a warp come here.
PW_DEVICE Walk begin_walk(const AttentionPlan& p) {
    Range range{0, num_requests(p), 0, 0};
    Walk walk{};
    for (bool is_first = true;; is_first = false) {
        int units;
        const Range own = lane_range(p, range, is_first && block_x() == 0, units);
        if (is_first) {
            const int total = shuffle(own.prefix + units, 31), grid = static_cast<int>(grid_x());
            walk.share = ceil_div(total, grid);
            const int64_t begin = int64_t(walk.share) * block_x();
            walk.unit = static_cast<int>(std::min<int64_t>(begin, total));
            walk.end = static_cast<int>(std::min<int64_t>(begin + walk.share, total));
        }
        if (walk.unit == walk.end) return walk;
        const uint32_t here = ballot(own.prefix <= walk.unit && walk.unit < own.prefix + units);
        if (here == 0) {  // lengths have changed between two looks
            walk.end = walk.unit;
            return walk;
        }
        const int lane = lowest_bit(here);
        range = {shuffle(own.first, lane), shuffle(own.count, lane), shuffle(own.row_begin, lane),
                 shuffle(own.prefix, lane)};
        if (range.count == 1) break;
    }
    walk.request = range.first;
    walk.prefix = range.prefix;
    walk.work = work_of(p, range.first, range.row_begin);
    return walk;
}

PW_DEVICE Piece cut_next_piece(const AttentionPlan& p, Walk& walk) {
    Piece none{};
    none.request = -1;
    if (walk.unit == walk.end) return none;
    const auto units = [&] { return walk.work.units_of_head() * p.schedule.num_kv_heads; };
    while (walk.unit >= walk.prefix + units()) {
        walk.prefix += units();
        if (++walk.request == num_requests(p)) return none;  // lengths have changed
        walk.work = work_of(p, walk.request, walk.work.row_end);
    }
    const Piece piece = cut_piece(p.schedule, walk.work, walk.request, walk.prefix, walk.unit, walk.end, walk.share);
    walk.unit += piece.num_units;
    return piece;
}

// By one thread, between two barriers of the block.
PW_DEVICE void next_piece(const AttentionPlan& p, Walk* shared_walk, Piece* shared_piece) {
    Walk walk = load_shared(shared_walk);
    store_shared(shared_piece, cut_next_piece(p, walk));
    store_shared(shared_walk, walk);
}

}  // namespace pagewire
