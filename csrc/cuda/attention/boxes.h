// The warp that loads: lane j brings page j of a tile, K and V, in boxes of 128 bytes x box_len tokens.
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/attention/shape_sm90.h"
#include "cuda/device/copy_async.h"
#include "cuda/error_word.h"

namespace pagewire {

// One piece's tiles into the stages, each as soon as its last readers have left it.
template <class S>
PW_DEVICE void load_boxes(const AttentionPlan& p, const Piece& piece, const TensorMap& k, const TensorMap& v,
                          SharedSm90<S>& shared, Turn& turn) {
    const int lane = thread_index() % 32, box_len = p.box_len, boxes = S::kTile / box_len;
    const uint64_t policy = evict_first_policy();
    const int64_t row = piece.request * p.of.page_table.stride_row;
    int key = piece.key_begin + lane * box_len;
    const auto entry_of = [&] {
        return static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(p.page_size));
    };
    const auto is_wanted = [&] { return lane < boxes && key < piece.key_end && key + box_len > piece.first_key; };
    int next = is_wanted() ? load_global(p.of.page_table.data + row + entry_of()) : 0;
    PW_NO_UNROLL
    for (int first = piece.key_begin; first < piece.key_end; first += S::kTile) {
        const int page = next, entry = entry_of(), offset = key - entry * p.page_size;
        const bool wanted = is_wanted(), inside = static_cast<unsigned>(page) < static_cast<unsigned>(p.num_pages);
        key += S::kTile;
        if (is_wanted()) next = load_global(p.of.page_table.data + row + entry_of());
        if (wanted && !inside) {
            record_error(p.error_word, p.decodes ? ErrorKind::kDecodePage : ErrorKind::kPrefillPage, piece.request,
                         entry);
        }
        const uint32_t there = ballot(wanted && inside);
        Mbarrier& full = shared.full[turn.stage];
        shared.empty[turn.stage].wait(turn.parity ^ 1);
        if (lane == 0) {
            store_shared(&shared.boxes_there[turn.stage], there);
            full.arrive_expect_tx(2 * S::kTileBytes);
        }
        sync_warp();
        if (lane < boxes) {
            // outside the cache the TMA writes zeros
            const int from = wanted && inside ? page : p.num_pages;
            typename SharedSm90<S>::Stage& to = shared.stage[turn.stage];
            PW_UNROLL
            for (int panel = 0; panel < S::kPanels; ++panel) {
                const int at = panel * S::kTile * 128 + lane * box_len * 128, column = panel * S::kPanelElements;
                load_box(to.k + at, &k, column, offset, piece.head, from, &full, policy);
                load_box(to.v + at, &v, column, offset, piece.head, from, &full, policy);
            }
        }
        turn.next(p.num_stages);
    }
}

}  // namespace pagewire
