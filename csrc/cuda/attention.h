// decode, and prefill of short queries: one kernel, described by one plan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/call.h"
#include "pagewire/params.h"

namespace pagewire {

struct AttentionCache {
    const char* data;  // [num_pages, page_size, num_kv_heads, width], the last dim contiguous
    int64_t stride_page, stride_token, stride_head;  // in bytes
    int width;
    bool aligned;  // every row starts on 16 bytes
    ScaleView scale;
};

struct AttentionPlan {
    const char* q;                        // [num_tokens, num_qo_heads, k.width]
    int64_t q_stride_row, q_stride_head;  // in elements
    AttentionCache k, v;
    const int32_t* page_table;  // [batch_size, max_pages_per_seq]
    int64_t table_stride;
    const int32_t* seq_lens;  // [batch_size]
    int64_t seq_lens_stride;
    const int32_t* cu_seqlens_q;  // [batch_size + 1]; null: decode, one row per request
    char* out;                    // [num_tokens, num_qo_heads, v.width]
    int64_t out_stride_row, out_stride_head;
    float* lse;  // [num_tokens, num_qo_heads]; null: not wanted
    int64_t lse_stride_row, lse_stride_head;
    const float* alibi_slopes;  // [num_qo_heads] (stride_request 0) or [batch_size, num_qo_heads]; null: off
    int64_t alibi_stride_request, alibi_stride_head;
    const float* sinks;  // [num_qo_heads]; null: off
    int64_t sinks_stride;

    int batch_size, num_tokens, num_kv_heads, group_size;
    int num_pages, page_size, max_pages_per_seq;
    int max_q_len;  // 1 for decode
    float softmax_scale, softcap;
    bool causal, out_float32;
    bool q_aligned;                 // every row of q starts on 16 bytes
    int window_left, window_right;  // < 0: unbounded
    int split_size;                 // KV tokens; 0: work is shared out evenly instead
    int64_t* error_word;

    // filled in by the launcher
    int warps_m;     // warps that take different rows; the others take different keys
    int chunk_rows;  // 16 * warps_m: query rows (token, head of the group) a block works on at a time
    int max_chunks;  // of one request and kv head
    int max_splits;  // with split_size: parts of one item
    // with split_size: where the rows of a request begin among the rows of a part
    int64_t part_rows, part_rows_of_token, part_rows_of_request;
    int part_stride;   // floats of a row of `partial`: v.width rounded up to 4, and 4
    float* partial;    // [rows, part_stride]: unnormalised out, then max and sum
    int* counters;     // [num_counters] parts of an item that are done; zero before and after
    int num_counters;  // 0: nothing is ever merged
    int* blocks_done;  // of this launch; zero before and after
};

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
