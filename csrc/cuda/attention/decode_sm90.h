// Decode where the TMA is: sm_90 and newer, one token a request, at most 16 heads a group, pages of which at least 8 tokens
// fall into a tile together, cache rows of whole 128 bytes, no soft cap, ALiBi or scales by token.
//
// grid: [blocks that fit on the device]; a block does its share of all units, piece by piece (schedule.h). One warp asks
// for boxes of pages (boxes.h), four warps multiply 16 or 32 keys of each tile (columns.h), each with a softmax state of
// its own; they meet at a stage's mbarriers only. The roof is the memory's bandwidth.
//
// Plan, 160 threads: stages of 16 KiB (width 64), 32 KiB (128) or 64 KiB (256), of which all but one are in flight; as many
// as let 3, 2 or 1 blocks share a multiprocessor, at most 4. At most 128, 168 and 255 registers. No spills.
// Budget of decode_sm90_kernel: 250 instructions for 8 KiB of bfloat16, width 128.
#pragma once

#include "cuda/attention/boxes.h"
#include "cuda/attention/merge.h"
#include "cuda/attention/requests.h"
#include "cuda/attention/visible.h"

namespace pagewire {

// What a warp that multiplies does of one piece.
template <class S>
PW_DEVICE void attend_columns(const AttentionPlan& p, const Piece& piece, SharedSm90<S>& shared, Turn& turn,
                              Columns<S>& state) {
    const int key_in_tile = thread_index() / 32 * S::kStepKeys;
    const SeenKeys<S> seen = seen_keys<S>(p, piece, shared.q_unit);
    const QueryColumns<S> q = hold_query_columns<S>(shared.q);
    PW_NO_UNROLL
    for (int first = piece.key_begin; first < piece.key_end; first += S::kTile) {
        typename SharedSm90<S>::Stage& stage = shared.stage[turn.stage];
        const int key = first + key_in_tile;
        shared.full[turn.stage].wait(turn.parity);
        const uint32_t boxes = load_shared(&shared.boxes_there[turn.stage]);
        LogitTile<S> x;
        multiply_k_rows(q, shared.q, stage.k, key_in_tile, x);
        scale_columns<S>(seen, x);
        const bool all_seen = seen.has(key, S::kStepKeys);
        if (!all_seen || boxes != p.all_boxes) {
            mask_columns<S>(seen, boxes, p.box_len, key_in_tile, key, x);
            if (!all_seen) hide_values<S>(seen, stage.v, key_in_tile, key);
        }
        uint32_t weights[S::kKeyTiles][S::kRowTiles][2];
        weigh_columns<S>(state, x, weights);
        multiply_v_rows<S>(weights, stage.v, key_in_tile, state);
        fence_proxy_async();  // the TMA writes next where this warp has read
        sync_warp();
        if (thread_index() % 32 == 0) shared.empty[turn.stage].arrive();
        turn.next(p.num_stages);
    }
}

template <class T, int kWidth, int kRows>
PW_KERNEL((ShapeSm90<T, kWidth, kRows>::kThreads), (ShapeSm90<T, kWidth, kRows>::kMinBlocks))
void decode_sm90_kernel(const PW_GRID_CONSTANT TensorMap k, const PW_GRID_CONSTANT TensorMap v, const AttentionPlan p) {
#if defined(PW_HAS_TMA)
    using S = ShapeSm90<T, kWidth, kRows>;
    SharedSm90<S>& shared = *reinterpret_cast<SharedSm90<S>*>(shared_memory());
    const bool loads = thread_index() / 32 == S::kWarps;
    const bool leads = thread_index() == 32 * S::kWarps;
    if (leads) {
        prefetch_map(&k);
        prefetch_map(&v);
        for (int i = 0; i < p.num_stages; ++i) shared.full[i].init(1), shared.empty[i].init(S::kWarps);
        shared.queries.init(32 * S::kWarps);
        fence_mbarrier_init();
    }
    if (thread_index() < 32) prefetch_likely(p);
    if (loads) {
        const Walk walk = begin_walk(p);
        if (leads) store_shared(&shared.walk, walk);
    }
    Turn turn;
    int queries_parity = 0;
    for (;;) {
        if (leads) next_piece(p, &shared.walk, &shared.piece);
        sync_block();
        const Piece piece = load_shared(&shared.piece);
        if (piece.request < 0) break;
        if (piece.has_keys()) {
            Columns<S> state = empty_columns<S>();
            if (loads) {
                load_boxes(p, piece, k, v, shared, turn);
            } else {
                load_queries<S>(p, piece, shared.q, shared.q_unit);
                shared.queries.arrive();
                shared.queries.wait(queries_parity);
                queries_parity ^= 1;
                attend_columns(p, piece, shared, turn, state);
            }
            sync_block();
            const Piece again = load_shared(&shared.piece);
            finish<S>(p, again, shared.exchange, &shared.is_last, [&](int first) {
                if (!loads) exchange_columns<S>(shared.exchange, state, first);
            });
            fence_proxy_async();  // the TMA's next writes go where states were exchanged
        } else {
            store_empty<S>(p, piece);
        }
        sync_block();
    }
    leave(p);
#endif
}

}  // namespace pagewire
