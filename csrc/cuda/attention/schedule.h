// Who does what: the KV of a batch, cut into units and shared out over the blocks. Pure arithmetic, for a host and a
// device alike; nothing here reads memory.
//
// An item is (request, kv head, row tile); its KV is num_units units long, and one unit without keys if it has rows and no
// keys. The rows behind the last request's are a request without keys too. All units of all items form one line,
// request-major; block w takes units [w * share, (w + 1) * share), in pieces that end with the item. With splits a unit is
// a split and a piece of its own, so that nothing depends on where a block's share begins.
#pragma once

#include <cstdint>

#include "pagewire/params.h"

namespace pagewire {

constexpr int kMaxSplits = 64;

// a >= 0, b > 0; the sum of any two fits an unsigned.
constexpr int ceil_div(int a, int b) {
    return static_cast<int>((static_cast<unsigned>(a) + static_cast<unsigned>(b) - 1) / static_cast<unsigned>(b));
}
constexpr int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

struct Schedule {
    int num_kv_heads, group_size;
    int row_tile_len;   // packed rows (token, head of the group) a block works on at a time
    int max_q_len;      // 1 for decode
    int window_left;    // < 0: unbounded
    int capacity;       // KV tokens that a row of the page table has room for
    int tile;           // KV tokens a block takes at a time
    int unit_len;       // KV tokens; at least this many where units are splits
    bool splits;        // each unit is merged as such
    int max_row_tiles;  // of one request and kv head
    int max_splits;     // of one item
    // with splits: where the rows of a request begin among the rows of a part
    int64_t part_rows, part_rows_of_token, part_rows_of_request;
};

// What one request asks for.
struct RequestWork {
    int row_begin, row_end;  // of q and out
    int seq_len, first_key;
    int unit_len, first_unit, num_units;
    int num_row_tiles;  // 0: no rows
    bool bad_seq_len, too_long;

    constexpr int q_len() const { return row_end - row_begin; }
    constexpr int units_of_head() const { return num_units * num_row_tiles; }
};

// row_end below row_begin leaves a request without rows. What is too long or out of range is cut to no or fewer keys.
constexpr RequestWork request_work(const Schedule& s, int row_begin, int row_end, int seq_len) {
    RequestWork w{};
    w.row_begin = row_begin;
    w.row_end = row_end > row_begin ? row_end : row_begin;
    w.too_long = w.q_len() > s.max_q_len;
    w.seq_len = clamp(seq_len, 0, s.capacity);
    w.bad_seq_len = w.seq_len != seq_len;
    if (w.too_long) w.seq_len = 0;
    w.num_row_tiles = ceil_div(w.q_len() * s.group_size, s.row_tile_len);
    w.unit_len = s.unit_len;
    w.num_units = 1;
    w.first_key = static_cast<int>(first_key(w.seq_len, w.q_len(), s.window_left));
    if (s.splits) {
        const int least = ceil_div(ceil_div(w.seq_len, kMaxSplits), s.tile) * s.tile;
        if (least > w.unit_len) w.unit_len = least;
    }
    w.first_unit = w.first_key / w.unit_len;
    if (w.seq_len > w.first_key) w.num_units = (w.seq_len - 1) / w.unit_len + 1 - w.first_unit;
    return w;
}

// What one block does of one item, and where the parts of the item wait for each other.
struct alignas(128) Piece {
    int request;  // -1: there is none
    int head, row_tile;
    int row_begin, q_len, seq_len, first_key;
    int key_begin, key_end;
    int num_units;
    int num_parts;  // 1: the piece is all of its item
    int counter;
    // rows of plan.partial: where this part goes; where part 0 and part 1 are; from one to the next
    int64_t own_row, first_row, next_row, row_step;

    constexpr int64_t row_of(int part) const { return part == 0 ? first_row : next_row + (part - 1) * row_step; }
    constexpr bool has_keys() const { return key_begin < key_end; }
};

// The piece that begins at `unit` and ends before `end`; `prefix` units lie before the request.
constexpr Piece cut_piece(const Schedule& s, const RequestWork& w, int request, int prefix, int unit, int end,
                          int share) {
    const int item = (unit - prefix) / w.num_units, first = (unit - prefix) % w.num_units;
    Piece p{};
    p.request = request;
    p.head = item / w.num_row_tiles;
    p.row_tile = item % w.num_row_tiles;
    p.row_begin = w.row_begin;
    p.q_len = w.q_len();
    p.seq_len = w.seq_len;
    p.first_key = w.first_key;
    p.num_units = w.num_units - first;
    if (s.splits) {
        p.num_units = 1;
        p.num_parts = w.num_units;
        // all rows that can exist, split after split
        p.row_step = s.part_rows;
        p.first_row = int64_t(p.head) * s.max_splits * s.part_rows + w.row_begin * s.part_rows_of_token +
                      request * s.part_rows_of_request + int64_t(p.row_tile) * s.row_tile_len;
        p.next_row = p.first_row + p.row_step;
        p.own_row = p.first_row + first * p.row_step;
        p.counter = (request * s.num_kv_heads + p.head) * s.max_row_tiles + p.row_tile;
    } else {
        if (p.num_units > end - unit) p.num_units = end - unit;
        const int item_begin = unit - first, first_block = item_begin / share;
        p.num_parts = (item_begin + w.num_units - 1) / share - first_block + 1;
        // a block has room for two parts: of an item that began before it, then of one that goes on after it
        p.first_row = (2 * int64_t(first_block) + 1) * s.row_tile_len;
        p.next_row = 2 * (int64_t(first_block) + 1) * s.row_tile_len;
        p.row_step = 2 * s.row_tile_len;
        const int block = unit / share;
        p.own_row = block == first_block ? p.first_row : 2 * int64_t(block) * s.row_tile_len;
        p.counter = first_block;
    }
    int64_t key_begin = (int64_t(w.first_unit) + first) * w.unit_len;
    const int64_t key_end = key_begin + int64_t(p.num_units) * w.unit_len;
    // of a split that begins before the window, no tile without a visible key
    if (key_begin < w.first_key) key_begin += (w.first_key - static_cast<int>(key_begin)) / s.tile * s.tile;
    p.key_begin = static_cast<int>(key_begin < w.seq_len ? key_begin : w.seq_len);
    p.key_end = static_cast<int>(key_end < w.seq_len ? key_end : w.seq_len);
    return p;
}

}  // namespace pagewire
