// Any number of states become one.
//
// grid: [ceil(num_rows * num_heads / rows of a block), 1]. 2^log2_lanes lanes merge one row of one head, in state order.
// Lane i weighs states i, i + lanes, ... and hands the weights round; kAhead states' rows are on their way together.
//
// Roof: the device's memory, nearly all of it reading. Plan: 128 threads, at most 64 registers, 8 blocks a
// multiprocessor: kAhead * 16 bytes in flight a thread are 64 KiB a multiprocessor, where 4.8 TB/s for 0.8 us ask for 29.
#pragma once

#include "cuda/device/thread.h"
#include "cuda/merge/plan.h"

namespace pagewire::merging {

constexpr int kAhead = 4;

template <class T>
PW_DEVICE const T* row_of_state(const MergeParams& p, int64_t state, const Item& at) {
    return state == 0 ? row_of<const T>(p.first.out, at)
                      : row_of<const T>(p.second.out, at) + (state - 1) * p.stride_out;
}

// Of state first + lane.
PW_DEVICE float lse_of_lane(const MergeParams& p, int64_t first, const Item& at) {
    return first + at.lane < p.n ? lse_of(p, first + at.lane, at) : -infinity();
}

template <class T, class Out, bool kVector>
PW_KERNEL(kThreads, 8)
void merge_kernel(const Plan p) {
    constexpr int kCount = kElements<T, kVector>;
    const Item at = item_of_thread(p);
    const int leader = thread_index() - at.lane;  // the row's first lane
    const int64_t n = p.states.n, width = p.states.out.width;
    const auto num_from = [&](int64_t first) { return static_cast<int>(n - first < at.lanes ? n - first : at.lanes); };
    float lse = lse_of_lane(p.states, 0, at), largest = lse;
    PW_NO_UNROLL
    for (int64_t first = at.lanes; first < n; first += at.lanes) {
        largest = max_number(largest, lse_of_lane(p.states, first, at));
    }
    PW_NO_UNROLL
    for (int mask = 1; mask < at.lanes; mask <<= 1) largest = max_number(largest, shuffle_xor(largest, mask));
    const float base = largest > -infinity() ? largest : 0.0f;
    float sum = 0.0f, part = exp_exact(lse - base);
    PW_NO_UNROLL
    for (int64_t first = 0; first < n; first += at.lanes) {
        const float of_lane = first == 0 ? part : exp_exact(lse_of_lane(p.states, first, at) - base);
        PW_NO_UNROLL
        for (int i = 0; i < num_from(first); ++i) sum += shuffle(of_lane, leader + i);
    }
    const float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    PW_NO_UNROLL
    for (int64_t column = 0; column < width; column += at.lanes * kCount) {
        const int64_t element = column + at.lane * kCount;
        const bool exists = at.exists && element < width;
        float total[kCount] = {};
        PW_NO_UNROLL
        for (int64_t first = 0; first < n; first += at.lanes) {
            if (n > at.lanes) {
                lse = lse_of_lane(p.states, first, at);
                part = exp_exact(lse - base);
            }
            PW_NO_UNROLL
            for (int i = 0; i < num_from(first); i += kAhead) {
                Stored<T, kVector> stored[kAhead];
                PW_UNROLL
                for (int j = 0; j < kAhead; ++j) {
                    stored[j] = load_stored<kVector>(row_of_state<T>(p.states, first + i + j, at) + element,
                                                     exists && i + j < num_from(first));
                }
                PW_UNROLL
                for (int j = 0; j < kAhead; ++j) {
                    const float weight = shuffle(part, leader + i + j) * inverse;
                    // an empty state's out may be anything
                    const bool is_empty = shuffle(lse, leader + i + j) == -infinity() || i + j >= num_from(first);
                    float x[kCount];
                    widen<T, kVector>(stored[j], x);
                    PW_UNROLL
                    for (int e = 0; e < kCount; ++e) total[e] = is_empty ? total[e] : total[e] + weight * x[e];
                }
            }
        }
        if (exists) store_as(total, row_of<Out>(p.states.out, at) + element);
    }
    store_lse(p, at, largest, sum);
}

}  // namespace pagewire::merging
