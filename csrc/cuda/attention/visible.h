// decode_sm90's masks. All rows of a piece are heads of one token, so they see the same keys. Of keys they do not see V is
// zeroed in shared memory: the tensor core multiplies it by 0, which infinite and NaN values would survive.
#pragma once

#include "cuda/attention/columns.h"
#include "cuda/attention/mask.h"

namespace pagewire {

// What a thread's rows, 8n + 2t + e, see, and the scale of their logits, to base 2.
template <class S>
struct SeenKeys {
    int low, high;
    float scale[S::kRowTiles][2];

    PW_DEVICE bool has(int first, int count) const { return first >= low && first + count - 1 <= high; }
};

template <class S>
PW_DEVICE SeenKeys<S> seen_keys(const AttentionPlan& p, const Piece& piece, const float* q_units) {
    const float scale = p.of.softmax_scale * shared_scale(p.of.k_scale, piece.request, piece.head) * kLog2E;
    const KeyRange range = keys_of_row(p, piece, 0);
    SeenKeys<S> seen{std::max(range.low, piece.first_key), std::min(range.high, piece.seq_len - 1), {}};
    PW_UNROLL
    for (int n = 0; n < S::kRowTiles; ++n) {
        PW_UNROLL
        for (int e = 0; e < 2; ++e) {
            const int row = 8 * n + thread_index() % 4 * 2 + e;
            seen.scale[n][e] = scale * (S::kQuantised ? load_shared(q_units + row) : 1.0f);
        }
    }
    return seen;
}

template <class S>
PW_DEVICE void scale_columns(const SeenKeys<S>& seen, LogitTile<S>& x) {
    PW_UNROLL
    for (int m = 0; m < S::kKeyTiles; ++m) {
        PW_UNROLL
        for (int n = 0; n < S::kRowTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) x[m][n][i] *= seen.scale[n][i % 2];
        }
    }
}

// -inf where a key is not seen, or its page cannot be read. `boxes`: of the tile, a bit each.
template <class S>
PW_DEVICE void mask_columns(const SeenKeys<S>& seen, uint32_t boxes, int box_len, int key_in_tile, int key,
                            LogitTile<S>& x) {
    const int g = thread_index() % 32 / 4;
    PW_UNROLL
    for (int m = 0; m < S::kKeyTiles; ++m) {
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int inside = 16 * m + 8 * half + g;
            if ((boxes >> ((key_in_tile + inside) / box_len) & 1) && seen.has(key + inside, 1)) continue;
            PW_UNROLL
            for (int n = 0; n < S::kRowTiles; ++n) x[m][n][2 * half] = x[m][n][2 * half + 1] = -infinity();
        }
    }
}

// Zeros V of those of a warp's keys that are not seen.
template <class S>
PW_DEVICE void hide_values(const SeenKeys<S>& seen, char* v, int key_in_tile, int key) {
    PW_NO_UNROLL
    for (int i = thread_index() % 32; i < S::kStepKeys * S::kRowBytes / 16; i += 32) {
        const int inside = i % S::kStepKeys, chunk = i / S::kStepKeys;
        if (seen.has(key + inside, 1)) continue;
        store_shared(reinterpret_cast<Vec16*>(v + place_in_panels<S>(key_in_tile + inside, chunk)), Vec16{});
    }
    sync_warp();
}

}  // namespace pagewire
