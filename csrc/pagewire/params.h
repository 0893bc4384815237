// What each op is given, after the public checks of shapes, dtypes and strides.
#pragma once

#include <cstdint>

#include "pagewire/views.h"

namespace pagewire {

// decode and prefill. Request b owns query rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1]; row i of a
// request of q_len rows sits at position seq_len - q_len + i.
struct AttentionParams {
    const char* op;  // "decode" or "prefill", for messages
    RowsView q;      // [num_tokens, num_qo_heads, head_dim]
    CacheView k;     // [num_pages, page_size, num_kv_heads, head_dim]
    CacheView v;     // [num_pages, page_size, num_kv_heads, head_dim_v]
    PageTableView page_table;
    IndexView seq_lens;      // [batch_size] int32
    IndexView cu_seqlens_q;  // [batch_size + 1] int32; size 0: one row per request
    RowsView out;            // [num_tokens, num_qo_heads, head_dim_v]
    MatrixView lse;          // [num_tokens, num_qo_heads], natural log

    float softmax_scale;
    bool causal;
    int64_t window_left, window_right;  // < 0: unbounded
    float softcap;                      // 0: off
    MatrixView alibi_slopes;            // [batch_size or 1 (stride 0), num_qo_heads]; null: off
    MatrixView sinks;                   // [1 (stride 0), num_qo_heads]; null: off
    ScaleView k_scale, v_scale;
    int64_t split_size;  // KV tokens; 0: the backend's choice
    int64_t max_q_len;   // 0: unbounded
};

// Moves tokens between rows and slots of one layer's K or V, converting: append and unpack (rows -> slots), pack (slots
// -> rows). On the side of the slots a token sits at page * stride_page + offset * stride_token, on the other at token
// * stride_token; the strides of the scale are meant alike.
struct MoveParams {
    struct Side {
        char* data;
        DType dtype;
        int64_t stride_page, stride_token, stride_head;
        ScaleView scale;
    };
    Side source, target;
    IndexView slots;  // [num_tokens]; negative: skip
    int64_t page_size, num_heads, width;
    bool to_slots;       // the target has the slots
    bool skip_negative;  // slots below 0 are skipped (append), else they are wrong
    bool make_scale;     // per token and head, from amax; written to target.scale
    bool copy;           // same dtype: bytes; a source scale per token and head travels along
    bool stream;         // so many bytes that no cache would keep them: past the caches
};

// n attention states over disjoint keys, each [num_rows, num_heads, width] with its lse [num_rows,
// num_heads], natural log; lse +inf and -inf are empty. out and lse may be one of the states.
struct MergeParams {
    const RowsView* outs;    // [n]
    const MatrixView* lses;  // [n]
    int64_t n;
    RowsView out;
    MatrixView lse;
    MatrixView sinks;  // [1 (stride 0), num_heads]; null: off
};

}  // namespace pagewire
