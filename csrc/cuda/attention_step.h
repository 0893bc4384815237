// One step: the keys of a warp against 16 rows; logits, running softmax, weighted sum of V.
#pragma once

#include "cuda/attention_loads.h"

namespace pagewire {

template <class S, class Q, class KV>
struct AttentionStep : AttentionLoads<S, Q, KV> {
    using Below = AttentionLoads<S, Q, KV>;
    using Below::Below;
    using Below::key_bits;
    using Below::key_scale;
    using Below::lane;
    using Below::p;
    using Below::q_rows;
    using Below::tile;

    // One thread's share of a 16-row state: rows g and g + 8 (g = lane / 4).
    struct State {
        float max[2], sum[2];
        float out[S::kColumns][4];  // columns of an 8-wide tile: two of row g, two of row g + 8
    };

    struct Rows {  // what masks and biases need to know of rows g and g + 8
        int low[2], high[2], position[2];
        float slope[2];
    };

    PW_DEVICE Rows rows_of(const RequestWork& w, const Segment& s, int m) const {
        Rows rows;
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int packed = s.chunk * p.chunk_rows + m * 16 + lane / 4 + 8 * half;
            const int token = packed / p.group_size,
                      head = s.head * p.group_size + packed % p.group_size;
            const int position = w.seq_len - w.q_len + token;
            int low = 0, high = w.seq_len - 1;
            if (p.window_left >= 0 && position - p.window_left > low)
                low = position - p.window_left;
            if (p.causal && position < high) high = position;
            if (p.window_right >= 0 && int64_t(position) + p.window_right < high)
                high = position + p.window_right;
            rows.low[half] = low;
            rows.high[half] = token < w.q_len ? high : -1;
            rows.position[half] = position;
            rows.slope[half] = 0.0f;
            if (p.alibi_slopes && token < w.q_len) {
                rows.slope[half] = load_global(p.alibi_slopes + s.request * p.alibi_stride_request +
                                               head * p.alibi_stride_head);
            }
        }
        return rows;
    }

    PW_DEVICE static float shared_scale(const AttentionScale& scale, int request, int head) {
        if (scale.form == ScaleForm::kValue) return scale.value;
        if (scale.form == ScaleForm::kPerHead) {
            return load_global(scale.data + request * scale.stride_request +
                               head * scale.stride_head);
        }
        return 1.0f;
    }

    PW_DEVICE void load_q_step(uint32_t (&a)[4], int m, int step) const {
        load_matrices(a,
                      q_rows() + swizzle<S::kQRowBytes>(m * 16 + lane % 16, 2 * step + lane / 16));
    }

    // kKeys keys of one tile against 16 rows.
    template <int kSteps>
    PW_DEVICE void step(State& state, const Rows& rows, const uint32_t (&q)[kSteps][4], int stage,
                        int group, int first_key, int m, float scale) {
        constexpr int kTiles = S::kKeys / 8;
        float x[kTiles][4];
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
        }
        logits(x, q, tile(stage, 0), group * S::kKeys, m);
        mask_and_scale(x, rows, stage, group, first_key, scale);
        float rescale[2];
        softmax(x, state, rescale);
        if (ballot(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; ++n) {
                PW_UNROLL
                for (int i = 0; i < 4; ++i) state.out[n][i] *= rescale[i / 2];
            }
        }
        if (p.v.scale.form == ScaleForm::kTokenHead) {
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int key = group * S::kKeys + n * 8 + lane % 4 * 2 + i % 2;
                    x[n][i] *= load_shared(key_scale(stage, 1, key)) * scale_lift<KV>();
                }
            }
        }
        accumulate(x, state, tile(stage, 1), group * S::kKeys);
    }

    // x[row][key] of this thread: rows g, g + 8; keys 8n + 2t, 8n + 2t + 1 (t = lane % 4).
    template <int kTiles, int kSteps>
    PW_DEVICE void logits(float (&x)[kTiles][4], const uint32_t (&q)[kSteps][4], const char* k,
                          int first, int m) const {
        constexpr int kPerLoad = S::kQuantised ? 4 : 2;  // 16-wide steps in four chunks of a K row
        PW_UNROLL
        for (int load = 0; load < S::kWidth / 16 / kPerLoad; ++load) {
            if (load * kPerLoad * 16 >= p.k.width) break;
            uint32_t a[kPerLoad][4];
            PW_UNROLL
            for (int i = 0; i < kPerLoad; ++i) {
                if constexpr (S::kQInRegisters) {
                    PW_UNROLL
                    for (int j = 0; j < 4; ++j) a[i][j] = q[load * kPerLoad + i][j];
                } else {
                    load_q_step(a[i], m, load * kPerLoad + i);
                }
            }
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                uint32_t b[4];
                load_matrices(
                    b, k + swizzle<S::kRowBytes>(first + n * 8 + lane % 8, load * 4 + lane / 8));
                PW_UNROLL
                for (int i = 0; i < kPerLoad; ++i) {
                    if constexpr (S::kQuantised) {
                        multiply_accumulate<Operand<Q>::kBFloat16>(
                            x[n], a[i], widen<Q>(b[i] & 0xffff, KV{}), widen<Q>(b[i] >> 16, KV{}));
                    } else {
                        multiply_accumulate<Operand<Q>::kBFloat16>(x[n], a[i], b[2 * i],
                                                                   b[2 * i + 1]);
                    }
                }
            }
        }
    }

    template <int kTiles>
    PW_DEVICE void mask_and_scale(float (&x)[kTiles][4], const Rows& rows, int stage, int group,
                                  int first_key, float scale) const {
        const uint32_t bits = load_shared(key_bits(stage, group));
        const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr;
        const bool per_token = p.k.scale.form == ScaleForm::kTokenHead;
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int inside = n * 8 + lane % 4 * 2 + i % 2, key = first_key + inside,
                          half = i / 2;
                float y = x[n][i];
                if (per_token) y *= load_shared(key_scale(stage, 0, group * S::kKeys + inside));
                if (plain) {
                    y *= scale * kLog2E;
                } else {
                    y *= scale;
                    if (p.softcap > 0.0f) y = p.softcap * tanh_exact(divide(y, p.softcap));
                    const int distance = rows.position[half] - key;
                    y -= rows.slope[half] * static_cast<float>(distance < 0 ? -distance : distance);
                    y *= kLog2E;
                }
                const bool visible =
                    (bits >> inside & 1) && key >= rows.low[half] && key <= rows.high[half];
                x[n][i] = visible ? y : -infinity();
            }
        }
    }

    // Logits (base 2) to weights against the running maximum. The sums stay per thread until
    // finish().
    template <int kTiles>
    PW_DEVICE void softmax(float (&x)[kTiles][4], State& state, float (&rescale)[2]) const {
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = state.max[half];
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                largest = fmaxf(largest, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            // no key seen yet: any finite base keeps exp2(-inf - base) = 0
            const float base = largest == -infinity() ? 0.0f : largest;
            rescale[half] = exp2_fast(state.max[half] - base);
            state.max[half] = largest;
            float sum = 0.0f;
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    x[n][2 * half + i] = exp2_fast(x[n][2 * half + i] - base);
                    sum += x[n][2 * half + i];
                }
            }
            state.sum[half] = state.sum[half] * rescale[half] + sum;
        }
    }

    template <int kTiles>
    PW_DEVICE void accumulate(const float (&x)[kTiles][4], State& state, const char* v,
                              int first) const {
        uint32_t a[kTiles / 2][4];
        PW_UNROLL
        for (int step = 0; step < kTiles / 2; ++step) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&pair)[4] = x[2 * step + i / 2];
                a[step][i] = Operand<Q>::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
        constexpr bool kBFloat16 = Operand<Q>::kBFloat16;
        if constexpr (S::kQuantised) {
            // a chunk holds 16 columns; transposing byte pairs gives columns 2g and 2g + 1 of keys
            // 2t and 2t + 1
            PW_UNROLL
            for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
                if (chunk * 16 >= p.v.width) break;
                uint32_t r[4];
                load_matrices_transposed(r, v + swizzle<S::kRowBytes>(first + lane, chunk));
                uint32_t even[4], odd[4];
                PW_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const uint32_t sorted = permute_bytes(r[i], 0, 0x3120);
                    even[i] = widen<Q>(sorted & 0xffff, KV{});
                    odd[i] = widen<Q>(sorted >> 16, KV{});
                }
                PW_UNROLL
                for (int step = 0; step < 2; ++step) {
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk], a[step], even[2 * step],
                                                   even[2 * step + 1]);
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk + 1], a[step], odd[2 * step],
                                                   odd[2 * step + 1]);
                }
            }
        } else {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; n += 2) {
                if (n * 8 >= p.v.width) break;
                uint32_t b[4];
                load_matrices_transposed(
                    b, v + swizzle<S::kRowBytes>(first + lane % 16, n + lane / 16));
                multiply_accumulate<kBFloat16>(state.out[n], a[0], b[0], b[1]);
                multiply_accumulate<kBFloat16>(state.out[n + 1], a[0], b[2], b[3]);
            }
        }
    }

    // The column of out[n][i], and of out[n][i + 2].
    PW_DEVICE int column_of(int n, int i) const {
        const int column = lane % 4 * 2 + i;
        if constexpr (S::kQuantised) return n / 2 * 16 + 2 * column + n % 2;
        return n * 8 + column;
    }
};

}  // namespace pagewire
