// Where the keys of a warp's copies lie: a cursor over the page table, a tile ahead of the copies.
#pragma once

#include "cuda/attention/shape.h"
#include "cuda/device/memory.h"
#include "cuda/error_word.h"

namespace pagewire {

// This lane's key of the next tile: lane % kCopyKeys of those the warp copies.
struct PageCursor {
    int64_t row;  // of the table, where the request's begins
    int key, end;
    int entry, offset;  // of the table; inside the page
    int entries_a_tile, offset_a_tile;
};

// What the table says of one key; not yet looked at, so that nobody waits for it.
struct PageOfKey {
    int page;
    int offset;  // inside the page
    int entry;   // -1: no key
};

template <class S>
PW_DEVICE PageCursor begin_pages(const AttentionPlan& p, const Piece& piece) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const int key = piece.key_begin + warp * S::kCopyKeys + lane % S::kCopyKeys;
    const int entry = static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(p.page_size));
    return {keep(piece.request * p.of.page_table.stride_row),
            key,
            piece.key_end,
            entry,
            key - entry * p.page_size,
            keep(S::kTile / p.page_size),
            keep(S::kTile % p.page_size)};
}

// first_key: the first that any row of the request sees.
template <class S>
PW_DEVICE PageOfKey fetch_page(const AttentionPlan& p, int first_key, PageCursor& c) {
    PageOfKey at{0, c.offset, -1};
    if (c.key >= first_key && c.key < c.end) {
        at.entry = c.entry;
        at.page = load_global(p.of.page_table.data + (c.row + c.entry));
    }
    c.key += S::kTile;
    c.entry += c.entries_a_tile;
    c.offset += c.offset_a_tile;
    if (c.offset >= p.page_size) {
        c.offset -= p.page_size;
        ++c.entry;
    }
    return at;
}

// A bit for each of the warp's kCopyKeys keys that can be read. Pages outside the cache are recorded.
template <class S>
PW_DEVICE uint32_t readable_keys(const AttentionPlan& p, int request, const PageOfKey& at) {
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t(1) << S::kCopyKeys) - 1);
    const bool exists = at.entry >= 0, inside = static_cast<unsigned>(at.page) < static_cast<unsigned>(p.num_pages);
    const uint32_t readable = ballot(exists && inside);
    if (readable != ballot(exists) && exists && !inside) {
        record_error(p.error_word, p.decodes ? ErrorKind::kDecodePage : ErrorKind::kPrefillPage, request, at.entry);
    }
    return readable & kAll;
}

}  // namespace pagewire
