// Which keys a row sees, and what modifiers do to a logit.
#pragma once

#include "cuda/attention/shape.h"
#include "cuda/device/memory.h"

namespace pagewire {

constexpr float kLog2E = 1.4426950408889634f;

// What masks and biases need to know of a thread's rows, g and g + 8 of 16 (g = lane / 4).
struct Rows {
    int low[2], high[2], position[2];
    int low_of_all, high_of_all;  // every row of the warp sees the keys between, as far as they exist
    float slope[2], scale[2];     // of the logits
    float unit[2];                // what 1 in q stands for

    PW_DEVICE bool sees(int half, int key) const { return key >= low[half] && key <= high[half]; }
    PW_DEVICE bool all_see(int first_key, int count) const {
        return first_key >= low_of_all && first_key + count - 1 <= high_of_all;
    }
};

// 1 where each token has its own.
PW_DEVICE float shared_scale(const ScaleView& scale, int request, int head) {
    if (scale.data == nullptr) return scale.value;
    if (scale.kind == ScaleKind::kTokenHead) return 1.0f;
    return load_global(scale.data + request * scale.stride_batch + head * scale.stride_head);
}

// What a row of a piece's row tile sees of its request: low .. high. Open where the request has no more keys, and for rows
// that do not exist, which are never stored.
struct KeyRange {
    int low, high, position;
    int head;
    bool exists;
};

PW_DEVICE KeyRange keys_of_row(const AttentionPlan& p, const Piece& piece, int row) {
    const Schedule& s = p.schedule;
    const int packed = piece.row_tile * s.row_tile_len + row, token = packed / s.group_size;
    const int position = piece.seq_len - piece.q_len + token, last = piece.seq_len - 1;
    int64_t low = 0, high = last;
    if (p.of.window_left >= 0) low = position - p.of.window_left;
    if (p.of.causal) high = std::min<int64_t>(high, position);
    if (p.of.window_right >= 0) high = std::min<int64_t>(high, position + p.of.window_right);
    const bool exists = token < piece.q_len;
    return {.low = exists && low > piece.first_key ? static_cast<int>(low) : 0,
            .high = exists && high < last ? static_cast<int>(high) : INT32_MAX,
            .position = position,
            .head = piece.head * s.group_size + packed - token * s.group_size,
            .exists = exists};
}

// Rows first_row .. first_row + 15 of a piece's row tile.
template <class S, bool kPlain>
PW_DEVICE Rows rows_of_warp(const AttentionPlan& p, const Piece& piece, const Shared<S>& shared, int first_row) {
    const int lane = thread_index() % 32;
    const float scale = p.of.softmax_scale * shared_scale(p.of.k_scale, piece.request, piece.head);
    Rows rows{};
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + 8 * half;
        const KeyRange range = keys_of_row(p, piece, row);
        rows.low[half] = range.low;
        rows.high[half] = range.high;
        rows.position[half] = range.position;
        rows.scale[half] = scale;
        rows.unit[half] = S::kQuantised ? load_shared(&shared.q_unit[row]) : 1.0f;
        if constexpr (!kPlain) {
            const MatrixView& slopes = p.of.alibi_slopes;
            if (slopes.data && range.exists) {
                rows.slope[half] =
                    load_global(slopes.data + piece.request * slopes.stride_row + range.head * slopes.stride_head);
            }
        }
    }
    rows.low_of_all = std::max(rows.low[0], rows.low[1]);
    rows.high_of_all = std::min(rows.high[0], rows.high[1]);
    PW_UNROLL
    for (int mask = 4; mask < 32; mask *= 2) {
        rows.low_of_all = std::max(rows.low_of_all, shuffle_xor(rows.low_of_all, mask));
        rows.high_of_all = std::min(rows.high_of_all, shuffle_xor(rows.high_of_all, mask));
    }
    return rows;
}

// Soft cap and ALiBi of a scaled logit, then base 2.
PW_DEVICE float modified(const AttentionPlan& p, const Rows& rows, int half, int key, float y) {
    if (p.of.softcap > 0.0f) y = p.of.softcap * tanh_exact(divide(y, p.of.softcap));
    const int distance = rows.position[half] - key;
    return (y - rows.slope[half] * static_cast<float>(distance < 0 ? -distance : distance)) * kLog2E;
}

// Which of the kStepKeys keys of a step are there.
template <class S>
PW_DEVICE uint32_t keys_there(const Shared<S>& shared, int stage, int step) {
    constexpr int kCopies = S::kStepKeys / S::kCopyKeys;  // warps that copied them
    uint32_t keys = 0;
    PW_UNROLL
    for (int i = 0; i < kCopies; ++i) {
        keys |= load_shared(&shared.keys_there[stage][step * kCopies + i]) << (i * S::kCopyKeys);
    }
    return keys;
}

// Logits as they are multiplied to base 2, -inf where a row does not see a key. x[n][i]: rows g (i < 2) and g + 8, key
// 8n + 2t + i % 2 of the step (t = lane % 4).
template <class S, bool kPlain>
PW_DEVICE void scale_and_mask(const AttentionPlan& p, const Rows& rows, const Shared<S>& shared, int stage, int step,
                              int first_key, float (&x)[S::kTiles][4]) {
    const int t2 = thread_index() % 4 * 2;
    const bool by_token = p.of.k_scale.kind == ScaleKind::kTokenHead;
    const float base_2 = kPlain ? kLog2E : 1.0f;
    float factor[2] = {rows.scale[0] * base_2, rows.scale[1] * base_2};
    PW_UNROLL
    for (int half = 0; half < 2; ++half) {
        if (S::kQuantised && !by_token) factor[half] *= rows.unit[half];
    }
    if (by_token) {  // q as it was: a scale may be as large as its lift
        PW_UNROLL
        for (int n = 0; n < S::kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                x[n][i] *= rows.unit[i / 2];
                x[n][i] *= load_shared(&shared.token_scale[stage][0][step * S::kStepKeys + n * 8 + t2 + i % 2]);
            }
        }
    }
    PW_UNROLL
    for (int n = 0; n < S::kTiles; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) {
            x[n][i] *= factor[i / 2];
            if constexpr (!kPlain) x[n][i] = modified(p, rows, i / 2, first_key + n * 8 + t2 + i % 2, x[n][i]);
        }
    }
    constexpr uint32_t kAll = static_cast<uint32_t>((uint64_t(1) << S::kStepKeys) - 1);
    const uint32_t there = keys_there(shared, stage, step);
    if (there == kAll && rows.all_see(first_key, S::kStepKeys)) return;
    PW_UNROLL
    for (int n = 0; n < S::kTiles; ++n) {
        PW_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int inside = n * 8 + t2 + i % 2;
            if (!(there >> inside & 1) || !rows.sees(i / 2, first_key + inside)) x[n][i] = -infinity();
        }
    }
}

}  // namespace pagewire
