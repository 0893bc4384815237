// The portable attention kernel: decode, and prefill of short queries, on sm_80 and newer.
//
// grid: [blocks that fit on the device]; a block does its share of all units, piece by piece (schedule.h). The query heads
// of a group, times the rows of a short query, are packed to the tensor core's 16 rows, so that every byte of KV is read
// once. The roof is the memory's bandwidth, if a warp executes few enough instructions a byte.
//
// With at most 16 rows (kWide = false) each of a block's warps has keys and copies of its own, of every tile, and no block
// barrier in its loop. With more, warps take 16 rows each over the same tile (shape.h).
//
// Plan, bytes of K and V in flight a block = (stages - 1) * stage; the launcher takes as many stages, at most 4, as let
// kMinBlocks blocks share a multiprocessor, or else fewer (99 KiB of shared memory):
//   up to 16 rows, width 64: stages of 16 KiB, 128 threads, 3 blocks, at most 168 registers
//                  width 128: stages of 32 KiB, 128 threads, 2 blocks; width 256: 32 KiB, 64 threads, 2 blocks
//   17 to 64 rows: stages of 16 KiB (width 64) or 32 KiB, 256 threads, 1 block
// No spills, no local memory.
// Budget of decode_kernel: 320 instructions for 8 KiB of bfloat16, width 128, 20 a copy.
#pragma once

#include "cuda/attention/exchange.h"
#include "cuda/attention/load.h"
#include "cuda/attention/merge.h"
#include "cuda/attention/queries.h"
#include "cuda/attention/requests.h"
#include "cuda/attention/step.h"

namespace pagewire {

template <class S, bool kPlain>
PW_DEVICE void attend_piece(const AttentionPlan& p, Shared<S>& shared, const Piece& piece) {
    const Copies<S> copies = copies_of<S>(p, piece);
    const int num_tiles = ceil_div(piece.key_end - piece.key_begin, S::kTile), ahead = p.num_stages - 1;
    PageCursor cursor = begin_pages<S>(p, piece);
    PageOfKey at = fetch_page<S>(p, piece.first_key, cursor);
    PW_NO_UNROLL
    for (int i = 0; i < ahead; ++i) {
        const PageOfKey next = fetch_page<S>(p, piece.first_key, cursor);
        if (i < num_tiles) issue_tile(p, shared, piece, i, at, copies);
        commit_copies();
        at = next;
    }
    load_queries<S>(p, piece, shared.tiles.q, shared.q_unit);
    sync_block();

    const int warp = thread_index() / 32, first_row = S::kWide ? warp % p.row_warps * 16 : 0;
    const int first_step = keep(S::kWide ? warp / p.row_warps : warp), key_warps = keep(S::kWarps / p.row_warps);
    const Rows rows = rows_of_warp<S, kPlain>(p, piece, shared, first_row);
    const Operands<S> q = hold_operands(shared, first_row);
    State<S> state = empty_state<S>();
    int stage = 0, free_stage = ahead;
    PW_NO_UNROLL
    for (int i = 0; i < num_tiles; ++i) {
        const PageOfKey next = fetch_page<S>(p, piece.first_key, cursor);
        wait_for_tile(p.num_stages);
        S::kWide ? sync_block() : sync_warp();  // tile i is there for its readers, and nobody reads tile i - 1 any more
        if (i + ahead < num_tiles) issue_tile(p, shared, piece, free_stage, at, copies);
        commit_copies();
        at = next;
        const auto attend = [&](int step) {
            const int first_key = piece.key_begin + i * S::kTile + step * S::kStepKeys;
            attend_step<S, kPlain>(p, state, rows, q, shared, stage, step, first_key);
        };
        if constexpr (S::kWide) {
            PW_NO_UNROLL
            for (int step = first_step; step < S::kSteps; step += key_warps) attend(step);
        } else {
            attend(first_step);  // the keys it copied
        }
        free_stage = stage;
        stage = stage + 1 == p.num_stages ? 0 : stage + 1;
    }
    wait_copies<0>();
    sync_block();
    const Piece again = load_shared(&shared.piece);  // registers would hold it through all keys
    finish<S>(p, again, shared.exchange, &shared.is_last,
              [&](int first) { exchange_columns<S>(p, shared.exchange, state, first); });
}

template <class T, int kWidth, bool kWide, bool kPlain>
PW_KERNEL((Shape<T, kWidth, kWide>::kThreads), (Shape<T, kWidth, kWide>::kMinBlocks))
void decode_kernel(const AttentionPlan p) {
    using S = Shape<T, kWidth, kWide>;
    Shared<S>& shared = shared_of_block<S>();
    if (thread_index() / 32 == 1) prefetch_likely(p);
    if (thread_index() < 32) {
        const Walk walk = begin_walk(p);
        if (thread_index() == 0) store_shared(&shared.walk, walk);
    }
    for (;;) {
        if (thread_index() == 0) next_piece(p, &shared.walk, &shared.piece);
        sync_block();
        const Piece piece = load_shared(&shared.piece);
        if (piece.request < 0) break;
        if (piece.has_keys()) {
            attend_piece<S, kPlain>(p, shared, piece);
        } else {
            store_empty<S>(p, piece);
        }
        sync_block();
    }
    leave(p);
}

}  // namespace pagewire
