// From pages to shared memory: asynchronous copies of K, V and their scales by token.
//
// Groups of neighbours that lie in one page cost a lane one address and then additions. A page's or a request's end, bad
// pages and narrow rows go row by row, with zeros for what is not there.
#pragma once

#include "cuda/attention/pages.h"
#include "cuda/device/copy_async.h"

namespace pagewire {

// K or V of one kv head, from this lane's chunk on. Strides in chunks of 16 bytes.
struct RowSource {
    const char* chunk;  // of page 0's first row
    uint32_t page_chunks, token_chunks;

    PW_DEVICE const char* at(int page, int offset) const {
        const uint64_t chunks = uint64_t(static_cast<uint32_t>(page)) * page_chunks +
                                uint64_t(static_cast<uint32_t>(offset)) * token_chunks;
        return chunk + chunks * 16;
    }
};

// What a lane copies of every tile: a chunk of the same row of each of a group's kRows rows and of the rows behind.
template <class S>
struct Copies {
    static constexpr int kGroups = S::kCopyKeys / S::kGroupKeys;  // side by side: a group has 32 / kGroups lanes
    static constexpr int kRows = 32 / kGroups / S::kRowChunks;    // of a group and an instruction
    RowSource k, v;
    int row;     // of the group
    int target;  // of that row, in a stage's K
    uint64_t policy;
};

template <class S>
PW_DEVICE RowSource row_source(const CacheView& cache, int head, int chunk) {
    constexpr int kSize = static_cast<int>(sizeof(typename S::T)), kChunk = 16 / kSize;
    const char* first = cache.data + head * cache.stride_head * kSize + chunk * 16;
    return {keep(first), static_cast<uint32_t>(cache.stride_page / kChunk),
            static_cast<uint32_t>(cache.stride_token / kChunk)};
}

template <class S>
PW_DEVICE Copies<S> copies_of(const AttentionPlan& p, const Piece& piece) {
    constexpr int kLanes = 32 / Copies<S>::kGroups;
    const int warp = thread_index() / 32, lane = thread_index() % 32, chunk = lane % S::kRowChunks;
    const int row = lane % kLanes / S::kRowChunks;
    const int first = warp * S::kCopyKeys + lane / kLanes * S::kGroupKeys;
    return {row_source<S>(p.of.k, piece.head, chunk), row_source<S>(p.of.v, piece.head, chunk), row,
            keep(swizzle<S::kRowBytes>(first + row, chunk)),
            // rows of other row tiles read the same K and V again
            p.schedule.max_row_tiles == 1 ? evict_first_policy() : evict_normal_policy()};
}

// `stage` as an offset from `tiles`, which lies on 128 bytes. `at`: of any key of this lane's group.
template <class S>
PW_DEVICE void copy_groups(const Copies<S>& c, char* tiles, int stage, const PageOfKey& at) {
    constexpr int kRows = Copies<S>::kRows;
    const int offset = at.offset - thread_index() % S::kGroupKeys + c.row;
    const char* k = c.k.at(at.page, offset);
    const char* v = c.v.at(at.page, offset);
    PW_UNROLL
    for (int j = 0; j < S::kGroupKeys; j += kRows) {
        char* to = tiles + (((stage + c.target) ^ swizzle_bits<S::kRowBytes>(j)) + j * S::kRowBytes);
        copy_async_16(to, k + uint64_t(c.k.token_chunks) * (16 * j), c.policy);
        copy_async_16(to + S::kTileBytes, v + uint64_t(c.v.token_chunks) * (16 * j), c.policy);
    }
}

// The same chunks row by row. `bytes`: of K's and V's rows.
template <class S>
PW_DEVICE void copy_rows(const Copies<S>& c, char* tiles, int stage, const PageOfKey& at, bool readable, int k_bytes,
                         int v_bytes) {
    constexpr int kRows = Copies<S>::kRows, kLanes = 32 / Copies<S>::kGroups;
    const int lane = thread_index() % 32, chunk = lane % S::kRowChunks;
    const int k_own = clamp(k_bytes - chunk * 16, 0, 16), v_own = clamp(v_bytes - chunk * 16, 0, 16);
    const int page_or_none = readable ? at.page : -1;
    PW_UNROLL
    for (int j = 0; j < S::kGroupKeys; j += kRows) {
        const int owner = lane / kLanes * S::kGroupKeys + j + c.row;
        const int page = shuffle(page_or_none, owner), offset = shuffle(at.offset, owner);
        const int k_read = page < 0 ? 0 : k_own, v_read = page < 0 ? 0 : v_own;
        char* to = tiles + (((stage + c.target) ^ swizzle_bits<S::kRowBytes>(j)) + j * S::kRowBytes);
        copy_async_16(to, k_read > 0 ? c.k.at(page, offset) : c.k.chunk, k_read, c.policy);
        copy_async_16(to + S::kTileBytes, v_read > 0 ? c.v.at(page, offset) : c.v.chunk, v_read, c.policy);
    }
}

template <class S>
PW_DEVICE void copy_token_scales(const ScaleView& scale, int head, float* to, const PageOfKey& at, bool readable) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    if (scale.kind != ScaleKind::kTokenHead || lane >= S::kCopyKeys) return;
    const float* from = readable ? scale.at(at.page, at.offset, head) : scale.data;
    copy_async_4(to + warp * S::kCopyKeys + lane, from, readable ? 4 : 0);
}

// Until the oldest of num_stages - 1 tiles on their way is there.
PW_DEVICE void wait_for_tile(int num_stages) {
    if (num_stages == 2) {
        wait_copies<0>();
    } else if (num_stages == 3) {
        wait_copies<1>();
    } else {
        wait_copies<2>();
    }
}

// This warp's share of one tile into a stage.
template <class S>
PW_DEVICE void issue_tile(const AttentionPlan& p, Shared<S>& shared, const Piece& piece, int stage, const PageOfKey& at,
                          const Copies<S>& c) {
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t(1) << S::kCopyKeys) - 1);
    constexpr int kSize = static_cast<int>(sizeof(typename S::T)), kStage = sizeof(typename Shared<S>::Stage);
    const uint32_t keys = readable_keys<S>(p, piece.request, at);
    const int lane = thread_index() % 32;
    if (lane == 0) store_shared(&shared.keys_there[stage][thread_index() / 32], keys);
    char* tiles = shared.tiles.stage[0].k;
    if (p.pages_hold_groups && keys == kAll) {
        copy_groups(c, tiles, stage * kStage, at);
    } else {
        copy_rows(c, tiles, stage * kStage, at, keys >> lane & 1, static_cast<int>(p.of.k.width) * kSize,
                  static_cast<int>(p.of.v.width) * kSize);
    }
    if (p.scales_by_token) {
        copy_token_scales<S>(p.of.k_scale, piece.head, shared.token_scale[stage][0], at, keys >> lane & 1);
        copy_token_scales<S>(p.of.v_scale, piece.head, shared.token_scale[stage][1], at, keys >> lane & 1);
    }
}

}  // namespace pagewire
