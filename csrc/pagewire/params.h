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

// The first key any row of the request can see; seq_len if there is no row.
constexpr int64_t first_key(int64_t seq_len, int64_t q_len, int64_t window_left) {
    if (q_len <= 0) return seq_len;
    if (window_left < 0) return 0;
    const int64_t first = seq_len - q_len - window_left;
    return first > 0 ? first : 0;
}

// How rows get from one side of a move to the other.
enum class MoveHow : int {
    kCopy,      // bytes; what scale the source has travels along
    kConvert,   // source times its scale, over the target's
    kQuantise,  // the same, and the target's scale is made: per token and head, from the row's amax
};

// Where the row of a token and head lies: page * stride_page + offset * stride_token + head * stride_head elements on,
// in a cache; token * stride_token + head * stride_head elsewhere. The strides of the scale are meant alike.
struct MoveSide {
    char* data;
    DType dtype;
    int64_t stride_page, stride_token, stride_head;
    ScaleView scale;
};

struct Move {  // of one layer's K or V
    MoveSide source, target;
    int64_t width;
    MoveHow how;
};

// append_kv, pack_kv and unpack_kv: the same slots in every layer.
struct MoveParams {
    const char* op;   // for messages
    IndexView slots;  // [num_tokens]
    bool to_cache;    // the target has the slots, else the source
    bool is_append;   // its slots are called slot_mapping, and negative ones are skipped
    int64_t page_size, num_slots, num_heads;
    const Move* moves;  // [num_layers, num_parts]
    int64_t num_moves;
    int num_parts;  // K and V; 1: V is a view of K
};

struct StateView {
    RowsView out;    // [num_rows, num_heads, width]
    MatrixView lse;  // [num_rows, num_heads], natural log; +inf and -inf are empty
};

// n attention states over disjoint keys. out and lse may be one of the states.
struct MergeParams {
    StateView first, second;         // state i > 0 lies i - 1 strides behind the second
    int64_t stride_out, stride_lse;  // in elements
    int64_t n;
    RowsView out;
    MatrixView lse;
    MatrixView sinks;  // [1 (stride 0), num_heads]; null: off
};

}  // namespace pagewire
