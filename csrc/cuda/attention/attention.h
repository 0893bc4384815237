// decode, and prefill of short queries.
#pragma once

#include <cstdint>

#include "cuda/call.h"
#include "pagewire/params.h"

namespace pagewire {

// What a call needs besides its arguments.
struct AttentionSpace {
    int64_t partial_floats, num_counters;
};
AttentionSpace attention_space(const AttentionParams& p, const Call& call);

// partial: fp32 [partial_floats]; counters: [num_counters] and blocks_done: one more, zero before and after.
struct AttentionWorkspace {
    float* partial;
    int *counters, *blocks_done;
};
void attention(const AttentionParams& p, const AttentionWorkspace& space, const Call& call);

}  // namespace pagewire
