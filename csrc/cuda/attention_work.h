// Who does what: the KV of a batch, cut into units and shared out over the blocks by every block
// for itself.
//
// An item is (request, kv head, chunk of query rows); its KV is num_units units long. All units of
// all items form one line, request-major; block w takes units [w * share, (w + 1) * share). With
// split_size a unit is a split and each is merged as such, so that nothing depends on where a
// block's share begins.
#pragma once

#include "cuda/attention.h"
#include "cuda/device/copy_async.h"
#include "cuda/device/mma.h"
#include "cuda/error_word.h"

namespace pagewire {

// What one request asks for; no rows or no keys means num_units = 0.
struct RequestWork {
    int row_begin, row_end;  // of q and out
    int seq_len, first_key, q_len;
    int unit_len, first_unit, num_units;
    int num_chunks;
    bool bad_seq_len, too_long;

    PW_DEVICE int64_t total_units(int num_kv_heads) const { return int64_t(num_units) * num_kv_heads * num_chunks; }
};

PW_DEVICE int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Row offset `i` of q, forced into the tensor.
PW_DEVICE int row_offset(const AttentionPlan& p, int i) {
    if (p.cu_seqlens_q == nullptr) return i;
    return i == 0 ? 0 : clamp(load_global(p.cu_seqlens_q + i), 0, p.num_tokens);
}

// `row_begin`: the largest row offset up to the request's own (offsets that decrease leave it without rows).
PW_DEVICE RequestWork request_work(const AttentionPlan& p, int request, int row_begin, int row_end, int tile) {
    RequestWork w{};
    w.row_begin = row_begin;
    w.row_end = row_end > row_begin ? row_end : row_begin;
    w.q_len = w.row_end - w.row_begin;
    w.too_long = w.q_len > p.max_q_len;
    const int raw = load_global(p.seq_lens + request * p.seq_lens_stride);
    const int64_t capacity = int64_t(p.max_pages_per_seq) * p.page_size;
    w.seq_len = raw < 0 ? 0 : raw > capacity ? static_cast<int>(capacity) : raw;
    w.bad_seq_len = raw != w.seq_len;
    if (w.q_len == 0 || w.too_long) return w;
    w.first_key = 0;
    if (p.window_left >= 0) {
        const int64_t first = int64_t(w.seq_len) - w.q_len - p.window_left;
        w.first_key = first > 0 ? static_cast<int>(first) : 0;
    }
    w.unit_len = tile;
    if (p.split_size > 0) {
        const int least = ((w.seq_len + 63) / 64 + tile - 1) / tile * tile;  // at most 64 splits
        w.unit_len = p.split_size > least ? p.split_size : least;
    }
    w.num_chunks = (w.q_len * p.group_size + p.chunk_rows - 1) / p.chunk_rows;
    if (w.seq_len <= w.first_key) return w;
    w.first_unit = w.first_key / w.unit_len;
    w.num_units = (w.seq_len - 1) / w.unit_len + 1 - w.first_unit;
    return w;
}

// One piece of one item, done by one block.
struct Segment {
    int request, head, chunk;
    int key_begin, key_end;
};

// Where the parts of a segment's item wait for each other.
struct Parts {
    // rows of plan.partial: where this part goes; where part 0 and part 1 are; from one to the next
    int64_t own_row, first_row, next_row, row_step;
    int64_t counter, num_parts;  // 1: the segment is all of its item

    PW_DEVICE int64_t row_of(int part) const { return part == 0 ? first_row : next_row + (part - 1) * row_step; }
};

// Cuts the piece that begins at `unit` (counted over all items; `prefix` units lie before the
// request) and ends before `end`. Returns the number of units taken.
PW_DEVICE int64_t cut_segment(const AttentionPlan& p, const RequestWork& w, int request, int64_t prefix, int64_t unit,
                              int64_t end, int64_t share, Segment& s, Parts& parts) {
    const int64_t inside = unit - prefix;
    const int item = static_cast<int>(inside / w.num_units);
    const int first = static_cast<int>(inside % w.num_units);
    int64_t count = w.num_units - first;
    s.request = request;
    s.head = item / w.num_chunks;
    s.chunk = item % w.num_chunks;
    if (p.split_size > 0) {
        count = 1;
        parts.num_parts = w.num_units;
        // all rows that can exist, split after split
        parts.row_step = p.part_rows;
        parts.first_row = int64_t(s.head) * p.max_splits * p.part_rows + w.row_begin * p.part_rows_of_token +
                          request * p.part_rows_of_request + int64_t(s.chunk) * p.chunk_rows;
        parts.next_row = parts.first_row + parts.row_step;
        parts.own_row = parts.first_row + first * parts.row_step;
        parts.counter = (request * p.num_kv_heads + s.head) * p.max_chunks + s.chunk;
    } else {
        if (count > end - unit) count = end - unit;
        const int64_t item_begin = unit - first, item_end = item_begin + w.num_units;
        const int64_t block = unit / share, first_block = item_begin / share;
        parts.num_parts = static_cast<int>((item_end - 1) / share - first_block) + 1;
        // a block has room for two parts: of an item that began before it, then of one that goes on after it
        parts.first_row = (2 * first_block + 1) * p.chunk_rows;
        parts.next_row = 2 * (first_block + 1) * p.chunk_rows;
        parts.row_step = 2 * p.chunk_rows;
        parts.own_row = block == first_block ? parts.first_row : 2 * block * p.chunk_rows;
        parts.counter = static_cast<int>(first_block);
    }
    const int64_t key_begin = int64_t(w.first_unit + first) * w.unit_len;
    const int64_t key_end = key_begin + count * w.unit_len;
    s.key_begin = static_cast<int>(key_begin);
    s.key_end = key_end > w.seq_len ? w.seq_len : static_cast<int>(key_end);
    return count;
}

// Inclusive scans over a block of kThreads threads; `scratch` holds kThreads / 32 values.
template <int kThreads>
PW_DEVICE int64_t scan_sum(int64_t x, int64_t* scratch, int64_t& total) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    PW_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
        const int64_t before = shuffle_up(x, delta);
        if (lane >= delta) x += before;
    }
    if (lane == 31) store_shared(scratch + warp, x);
    sync_block();
    total = 0;
    PW_UNROLL
    for (int i = 0; i < kThreads / 32; ++i) {
        const int64_t sum = load_shared(scratch + i);
        if (i < warp) x += sum;
        total += sum;
    }
    sync_block();
    return x;
}

template <int kThreads>
PW_DEVICE int scan_max(int x, int* scratch, int& total) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    PW_UNROLL
    for (int delta = 1; delta < 32; delta *= 2) {
        const int before = shuffle_up(x, delta);
        if (lane >= delta && before > x) x = before;
    }
    if (lane == 31) store_shared(scratch + warp, x);
    sync_block();
    PW_UNROLL
    for (int i = 0; i < kThreads / 32; ++i) {
        const int largest = load_shared(scratch + i);
        if (i < warp && largest > x) x = largest;
        if (largest > total) total = largest;
    }
    sync_block();
    return x;
}

}  // namespace pagewire
