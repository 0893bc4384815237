// merge_state and merge_states: n attention states over disjoint keys become one.
#pragma once

#include <cstdint>

#include "pagewire/dtype.h"

namespace pagewire {

// States `first`, then num_rest more that lie stride_state apart. Strides in elements.
struct MergeStates {
    const char* out;  // [num_rows, num_heads, width]
    int64_t stride_state, stride_row, stride_head;
    const float* lse;  // [num_rows, num_heads], natural log; +inf and -inf are empty
    int64_t lse_stride_state, lse_stride_row, lse_stride_head;
};

struct MergeRequest {
    MergeStates first, rest;
    int num_states;  // first included
    DType dtype, out_dtype;
    int64_t num_rows, num_heads, width;
    char* out;
    int64_t stride_row, stride_head;
    float* lse;
    int64_t lse_stride_row, lse_stride_head;
    int device;
    uintptr_t stream;
};

void merge(const MergeRequest& request);

}  // namespace pagewire
