// What the attention kernels are told: a kernel's one argument.
#pragma once

#include "cuda/attention/schedule.h"
#include "pagewire/params.h"

namespace pagewire {

struct AttentionPlan {
    AttentionParams of;
    Schedule schedule;
    int64_t* error_word;

    // of `of`, as kernels divide and compare by them
    int batch_size, num_tokens, num_pages, page_size;
    bool decodes;      // one row per request, no cu_seqlens_q
    bool q_bfloat16;   // of an 8-bit cache's kernel, which takes both
    bool q_aligned;    // every row of q starts on 16 bytes
    bool out_aligned;  // four columns of out, from every fourth on, are stored at once
    // every kGroupKeys keys from the first of a piece on lie in one page, and rows are kWidth elements
    bool pages_hold_groups;
    bool scales_by_token;  // of K or V

    int box_len;         // of decode_sm90: tokens of a page that a tile takes at once
    uint32_t all_boxes;  // a bit for each box of a tile

    int num_stages;    // of a block's copy pipeline
    int row_warps;     // warps that take different rows; the others take different keys
    int part_stride;   // floats of a row of `partial`: v.width rounded up to 4, and 4
    float* partial;    // [rows, part_stride]: unnormalised out, then base and sum
    int* counters;     // [num_counters] parts of an item that are done; zero before and after
    int num_counters;  // 0: nothing is ever merged
    int* blocks_done;  // of this launch; zero before and after
};

}  // namespace pagewire
