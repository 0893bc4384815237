// merge_state, merge_states: what is launched.
#include "cuda/merge/merge.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/merge/many.h"
#include "cuda/merge/two.h"
#include "pagewire/dispatch.h"

namespace pagewire {

namespace merging {
namespace {

// That every row of both states and of out begins at a multiple of 16 bytes and has a multiple of 16 bytes.
bool is_aligned(const MergeParams& p) {
    int64_t bits = (p.out.width | p.stride_out) * item_size(p.first.out.dtype);
    for (const RowsView* rows : {&p.first.out, &p.second.out, &p.out}) {
        bits |=
            reinterpret_cast<intptr_t>(rows->data) | (rows->stride_row | rows->stride_head) * item_size(rows->dtype);
    }
    return bits % 16 == 0;
}

template <class T, class Out, bool kVector>
void start(const MergeParams& states, const Call& call) {
    const int64_t items = states.out.num_rows * states.out.num_heads;
    Plan p{.states = states,
           .num_items = static_cast<uint32_t>(items),
           .num_heads = Divisor<uint32_t>(states.out.num_heads),
           .log2_lanes = 0};
    const bool is_two = states.n == 2;
    const int of_lane = kElements<T, kVector> * (is_two ? kChunks : 1);
    while ((of_lane << p.log2_lanes) < states.out.width && p.log2_lanes < 5) ++p.log2_lanes;
    const int64_t rows = kThreads >> p.log2_lanes;
    launch(is_two ? merge_two_kernel<T, Out, kVector> : merge_kernel<T, Out, kVector>,
           LaunchConfig{.name = is_two ? "merge_two_kernel" : "merge_kernel",
                        .grid_x = (items + rows - 1) / rows,
                        .grid_y = 1,
                        .num_threads = kThreads,
                        .shared_bytes = 0,
                        .stream = call.stream},
           p);
}

// `count` rows from `first` on.
MergeParams some_rows(MergeParams p, int64_t first, int64_t count) {
    for (RowsView* rows : {&p.first.out, &p.second.out, &p.out}) {
        rows->data += first * rows->stride_row * item_size(rows->dtype);
        rows->num_rows = count;
    }
    for (MatrixView* lse : {&p.first.lse, &p.second.lse, &p.lse}) lse->data += first * lse->stride_row;
    return p;
}

template <class T, class Out>
void run(const MergeParams& p, const Call& call) {
    const int64_t most = std::max<int64_t>(INT32_MAX / p.out.num_heads, 1);  // an item's number has 31 bits
    for (int64_t first = 0; first < p.out.num_rows; first += most) {
        const MergeParams some = some_rows(p, first, std::min(most, p.out.num_rows - first));
        is_aligned(p) ? start<T, Out, true>(some, call) : start<T, Out, false>(some, call);
    }
}

}  // namespace
}  // namespace merging

void merge(const MergeParams& p, const Call& call) {
    if (p.out.num_rows * p.out.num_heads == 0) return;
    UseDevice guard(call.device);
    with_dtype(p.first.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 1) {
            throw std::invalid_argument("pagewire: merge_states takes fp16, bf16 and fp32");
        } else {
            return p.out.dtype == p.first.out.dtype ? merging::run<T, T>(p, call) : merging::run<T, float>(p, call);
        }
    });
}

}  // namespace pagewire
