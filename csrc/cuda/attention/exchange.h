// From a warp's registers to where the block merges its warps' states.
#pragma once

#include "cuda/attention/token_weights.h"

namespace pagewire {

// A thread's share of columns first .. first + kExchangeColumns - 1 of its warp's state.
template <class S>
PW_DEVICE void exchange_columns(const AttentionPlan& p, Exchange<S>& exchange, const State<S>& state, int first) {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + 8 * half;
        float sum = state.sum[half];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (lane % 4 == 0) {
            store_shared(&exchange.base[row], state.base[half]);
            store_shared(&exchange.sum[row], sum);
        }
        const float unit = out_unit(p, state, half);
        PW_UNROLL
        for (int n = 0; n < S::kColumns; ++n) {
            if (n * 8 / S::kExchangeColumns * S::kExchangeColumns != first) continue;
            PW_UNROLL
            for (int i = 0; i < 2; ++i) {
                store_shared(&exchange.out[row][column_of<S>(n, i) - first], state.out[n][2 * half + i] * unit);
            }
        }
    }
}

}  // namespace pagewire
