// What a merge's launch is told, and what a lane has of a row.
#pragma once

#include <type_traits>

#include "cuda/device/memory.h"
#include "cuda/divisor.h"
#include "cuda/words.h"
#include "pagewire/params.h"

namespace pagewire::merging {

constexpr int kThreads = 128;

struct Plan {
    MergeParams states;  // fewer than 2^31 rows * heads
    uint32_t num_items;  // rows * heads
    Divisor<uint32_t> num_heads;
    int log2_lanes;  // lanes that share a row
};

// A row of a head, and a lane of those that share it.
struct Item {
    uint32_t row, head;
    bool exists;
    int lanes, lane;
};

PW_DEVICE Item item_of_thread(const Plan& p) {
    const uint32_t at = block_x() * (kThreads >> p.log2_lanes) + static_cast<uint32_t>(thread_index() >> p.log2_lanes);
    const bool exists = at < p.num_items;
    const uint32_t of = exists ? at : 0, row = p.num_heads.quotient(of);
    const int lanes = 1 << p.log2_lanes;
    return {.row = row,
            .head = of - row * p.num_heads.divisor,
            .exists = exists,
            .lanes = lanes,
            .lane = thread_index() & (lanes - 1)};
}

// -inf where the state is empty, which some libraries mark with +inf.
PW_DEVICE float lse_of(const MergeParams& p, int64_t state, const Item& at) {
    const MatrixView& m = state == 0 ? p.first.lse : p.second.lse;
    const int64_t behind = state == 0 ? 0 : (state - 1) * p.stride_lse;
    const float lse = load_global(m.data + behind + at.row * m.stride_row + at.head * m.stride_head);
    return lse == infinity() ? -infinity() : lse;
}

// lse may be one of the inputs: all lanes of the row have read them.
PW_DEVICE void store_lse(const Plan& p, const Item& at, float largest, float sum) {
    const MatrixView& lse = p.states.lse;
    sync_warp();
    if (at.exists && at.lane == 0) {
        store_global(lse.data + at.row * lse.stride_row + at.head * lse.stride_head,
                     sum == 0.0f ? -infinity() : largest + log_exact(sum));
    }
}

template <class T>
PW_DEVICE T* row_of(const RowsView& rows, const Item& at) {
    return reinterpret_cast<T*>(rows.data) + at.row * rows.stride_row + at.head * rows.stride_head;
}

// A lane's elements at a time: 16 bytes of the states' dtype, or one where something is not aligned to that.
template <class T, bool kVector>
constexpr int kElements = kVector ? 16 / static_cast<int>(sizeof(T)) : 1;

template <class T, bool kVector>
using Stored = std::conditional_t<kVector, Vec16, T>;

template <bool kVector, class T>
PW_DEVICE Stored<T, kVector> load_stored(const T* p, bool exists) {
    Stored<T, kVector> s{};
    if (exists) {
        if constexpr (kVector) {
            s = load_streaming(reinterpret_cast<const Vec16*>(p));
        } else {
            s = load_global(p);
        }
    }
    return s;
}

template <class T, bool kVector>
PW_DEVICE void widen(const Stored<T, kVector>& s, float (&x)[kElements<T, kVector>]) {
    if constexpr (kVector) {
        PW_UNROLL
        for (int w = 0; w < 4; ++w) floats_of<T>(s.x[w], x + w * kPerWord<T>);
    } else {
        x[0] = to_float(s);
    }
}

template <class Out, int kCount>
PW_DEVICE void store_as(const float (&x)[kCount], Out* p) {
    if constexpr (kCount == 1) {
        Out y;
        from_float(x[0], y);
        store_global(p, y);
    } else {
        constexpr int kEach = kPerWord<Out>;
        PW_UNROLL
        for (int e = 0; e < kCount; e += 4 * kEach) {
            store_global(reinterpret_cast<Vec16*>(p + e),
                         Vec16{{word_of<Out>(x + e), word_of<Out>(x + e + kEach), word_of<Out>(x + e + 2 * kEach),
                                word_of<Out>(x + e + 3 * kEach)}});
        }
    }
}

}  // namespace pagewire::merging
