// Parts that are done: a block writes its part, then one thread counts it in, between two block barriers. Together they
// order the part before the count, and the count before the last block's reads, which go past L1. The last count sets the
// counter back for the next launch on the stream.
//
// Blocks agree on the parts of an item because they read the same lengths. Lengths that change while a launch runs break
// that, and would leave counters at a part of their way: every later launch would merge too early. So the last block to
// leave looks at all of them.
#pragma once

#include "cuda/attention/plan.h"
#include "cuda/device/memory.h"
#include "cuda/device/thread.h"
#include "cuda/error_word.h"

namespace pagewire {

// The block's part is written; whether all parts of its item are. Between this and the block's own barriers nothing else
// uses `shared`.
PW_DEVICE bool is_last_part(const AttentionPlan& p, const Piece& piece, int* shared) {
    if (thread_index() == 0) {
        const int last = piece.num_parts - 1;
        store_shared(shared, count_up_to(p.counters + piece.counter, last) == last ? 1 : 0);
    }
    sync_block();
    return load_shared(shared) != 0;
}

// The last block of the launch to come here has all counts behind it: every counter is back at zero, or is recorded and
// set back.
PW_DEVICE void leave(const AttentionPlan& p) {
    if (p.num_counters == 0 || thread_index() >= 32) return;
    const int lane = thread_index(), last = static_cast<int>(grid_x()) - 1;
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
        record_error(p.error_word, p.decodes ? ErrorKind::kDecodeCounter : ErrorKind::kPrefillCounter, 0, i);
    }
}

}  // namespace pagewire
