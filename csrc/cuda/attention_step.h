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
        float largest[2];           // weight times V's per-token scale so far: see lift_weights
    };

    struct Rows {  // what masks and biases need to know of rows g and g + 8
        int low[2], high[2], position[2];
        float slope[2];

        PW_DEVICE bool sees(int half, int key) const { return key >= low[half] && key <= high[half]; }
    };

    // Weights of fp16 that are multiplied by V's per-token scales must be kept in fp16's range.
    static constexpr bool kLifts = !Operand<Q>::kBFloat16;
    static constexpr int kCount = 4 / static_cast<int>(sizeof(KV));  // elements of a word

    PW_DEVICE Rows rows_of(const RequestWork& w, const Segment& s, int m) const {
        Rows rows;
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int packed = s.chunk * p.chunk_rows + m * 16 + lane / 4 + 8 * half;
            const int token = packed / p.group_size, head = s.head * p.group_size + packed % p.group_size;
            const int position = w.seq_len - w.q_len + token;
            int low = 0, high = w.seq_len - 1;
            if (p.window_left >= 0 && position - p.window_left > low) low = position - p.window_left;
            if (p.causal && position < high) high = position;
            if (p.window_right >= 0 && int64_t(position) + p.window_right < high) high = position + p.window_right;
            // open where the request has no more keys, and for rows that do not exist (they are
            // never stored): all_see
            const bool exists = token < w.q_len;
            rows.low[half] = exists && low > w.first_key ? low : 0;
            rows.high[half] = exists && high < w.seq_len - 1 ? high : 0x7fffffff;
            rows.position[half] = position;
            rows.slope[half] = 0.0f;
            if (p.alibi_slopes && token < w.q_len) {
                rows.slope[half] =
                    load_global(p.alibi_slopes + s.request * p.alibi_stride_request + head * p.alibi_stride_head);
            }
        }
        return rows;
    }

    // 1 where each token has its own.
    PW_DEVICE static float shared_scale(const ScaleView& scale, int request, int head) {
        if (scale.data == nullptr) return scale.value;
        if (scale.kind == ScaleKind::kTokenHead) return 1.0f;
        return load_global(scale.data + request * scale.stride_batch + head * scale.stride_head);
    }

    PW_DEVICE void load_q_step(uint32_t (&a)[4], int m, int step) const {
        load_matrices(a, q_rows() + swizzle<S::kQRowBytes>(m * 16 + lane % 16, 2 * step + lane / 16));
    }

    // kKeys keys of one tile against 16 rows.
    template <int kSteps>
    PW_DEVICE void step(State& state, const Rows& rows, const uint32_t (&q)[kSteps][4], int stage, int group,
                        int first_key, int m, float scale) {
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
        if (p.v.scale.kind == ScaleKind::kTokenHead) {
            scale_weights(x, rows, stage, group, first_key);
            if constexpr (kLifts) lift_weights(x, state, rescale);
        }
        if (ballot(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; ++n) {
                PW_UNROLL
                for (int i = 0; i < 4; ++i) state.out[n][i] *= rescale[i / 2];
            }
        }
        uint32_t a[kTiles / 2][4];
        pack_weights(a, x);
        if constexpr (NonFinite<KV>::kMask != 0) {
            if (!all_see(rows, first_key) && has_non_finite(stage, group)) {
                add_non_finite(state, rows, stage, group, first_key);
                PW_UNROLL
                for (int step = 0; step < kTiles / 2; ++step) clean<true, Q>(a[step]);
                accumulate<true>(a, state, tile(stage, 1), group * S::kKeys);
                return;
            }
        }
        accumulate<false>(a, state, tile(stage, 1), group * S::kKeys);
    }

    // x[row][key] of this thread: rows g, g + 8; keys 8n + 2t, 8n + 2t + 1 (t = lane % 4).
    template <int kTiles, int kSteps>
    PW_DEVICE void logits(float (&x)[kTiles][4], const uint32_t (&q)[kSteps][4], const char* k, int first,
                          int m) const {
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
                load_matrices(b, k + swizzle<S::kRowBytes>(first + n * 8 + lane % 8, load * 4 + lane / 8));
                PW_UNROLL
                for (int i = 0; i < kPerLoad; ++i) {
                    if constexpr (S::kQuantised) {
                        multiply_accumulate<Operand<Q>::kBFloat16>(x[n], a[i], widen<Q>(b[i] & 0xffff, KV{}),
                                                                   widen<Q>(b[i] >> 16, KV{}));
                    } else {
                        multiply_accumulate<Operand<Q>::kBFloat16>(x[n], a[i], b[2 * i], b[2 * i + 1]);
                    }
                }
            }
        }
    }

    template <int kTiles>
    PW_DEVICE void mask_and_scale(float (&x)[kTiles][4], const Rows& rows, int stage, int group, int first_key,
                                  float scale) const {
        const uint32_t bits = load_shared(key_bits(stage, group));
        const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr;
        const bool per_token = p.k.scale.kind == ScaleKind::kTokenHead;
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int inside = n * 8 + lane % 4 * 2 + i % 2, key = first_key + inside, half = i / 2;
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
                const bool visible = (bits >> inside & 1) && rows.sees(half, key);
                x[n][i] = visible ? y : -infinity();
            }
        }
    }

    // Logits (base 2) to weights against the running maximum. The sums stay per thread until finish().
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
    PW_DEVICE void scale_weights(float (&x)[kTiles][4], const Rows& rows, int stage, int group, int first_key) const {
        const uint32_t empty = kLifts ? empty_values(stage, group) : 0;
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int inside = n * 8 + lane % 4 * 2 + i % 2;
                const float scale = load_shared(key_scale(stage, 1, group * S::kKeys + inside));
                // a key that is not visible may have any scale, NaN too; one that is counts, whatever its weight, but
                // in 16-bit caches, whose kernels for 256 columns have no register left for it
                bool none = x[n][i] == 0.0f;
                if (S::kQuantised && none && !is_finite(scale)) none = !rows.sees(i / 2, first_key + inside);
                x[n][i] = none || (empty >> inside & 1) ? 0.0f : x[n][i] * scale;
            }
        }
    }

    // The step's keys, a bit each, that have scale 1 because their values are all zero: such a
    // scale need not be near the others', and says nothing of how far weights are to be lifted.
    PW_DEVICE uint32_t empty_values(int stage, int group) const {
        const int row = group * S::kKeys + lane % S::kKeys;
        bool empty = load_shared(key_scale(stage, 1, row)) == 1.0f;
        if (!ballot(empty)) return 0;
        PW_NO_UNROLL
        for (int chunk = 0; chunk * 4 * kCount < p.v.width; ++chunk) {
            const char* at = tile(stage, 1) + swizzle<S::kRowBytes>(row, chunk);
            const Vec16 four = load_shared(reinterpret_cast<const Vec16*>(at));
            PW_UNROLL
            for (int i = 0; i < 4; ++i) empty = empty && (four.x[i] & magnitudes<KV>()) == 0;
        }
        return ballot(empty);
    }

    // Brings a row's scaled weights to below 2^15 by a power of two that follows the largest of
    // them, shrunk as the sums are: fp16 reaches from there 2^29 down with all its digits, and
    // weights that lie further below lose theirs. The sums of out change their unit with it.
    template <int kTiles>
    PW_DEVICE void lift_weights(float (&x)[kTiles][4], State& state, float (&rescale)[2]) const {
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = state.largest[half] * rescale[half];
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const float y = x[n][2 * half + i];
                    largest = fmaxf(largest, is_finite(y) ? fabsf(y) : 0.0f);
                }
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            const float lift = power_of_two(lift_exponent(largest));
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) x[n][2 * half + i] *= lift;
            }
            rescale[half] = rescale[half] * lift * out_unit(state, half);
            state.largest[half] = largest;
        }
    }

    // 2^n with n and -n in a normal float's range.
    PW_DEVICE static int lift_exponent(float largest) {
        const int exponent = static_cast<int>(float_bits(largest) >> 23 & 0xff) - 127;
        return exponent < -112 ? 126 : 14 - exponent;
    }
    PW_DEVICE static float power_of_two(int n) { return float_from_bits(static_cast<uint32_t>(n + 127) << 23); }
    // What 1 in a row's out stands for.
    PW_DEVICE float out_unit(const State& state, int half) const {
        if (!kLifts || p.v.scale.kind != ScaleKind::kTokenHead) return 1.0f;
        return power_of_two(-lift_exponent(state.largest[half]));
    }

    // Every row of the warp sees all of the kKeys keys that the request owns.
    PW_DEVICE static bool all_see(const Rows& rows, int first_key) {
        return !ballot(!rows.sees(0, first_key) || !rows.sees(1, first_key) ||
                       !rows.sees(0, first_key + S::kKeys - 1) || !rows.sees(1, first_key + S::kKeys - 1));
    }

    PW_DEVICE bool has_non_finite(int stage, int group) const {
        const char* v = tile(stage, 1);
        uint32_t found = 0;
        PW_UNROLL_BY(2)
        for (int j = lane; j < S::kKeys * S::kRowChunks; j += 32) {
            const int row = group * S::kKeys + j / S::kRowChunks, chunk = j % S::kRowChunks;
            if (chunk * 4 * kCount >= p.v.width) continue;
            const Vec16 four = load_shared(reinterpret_cast<const Vec16*>(v + swizzle<S::kRowBytes>(row, chunk)));
            PW_UNROLL
            for (int i = 0; i < 4; ++i) found |= non_finite<KV>(four.x[i]);
        }
        return ballot(found != 0) != 0;
    }

    // 0 * inf would reach every row, so what is not finite is added to the sums of the rows that
    // see it, and is zero for the tensor core. A weight above 0 does not change it.
    PW_DEVICE void add_non_finite(State& state, const Rows& rows, int stage, int group, int first_key) const {
        PW_UNROLL
        for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
            if (chunk * 4 * kCount >= p.v.width) break;
            PW_NO_UNROLL
            for (int inside = 0; inside < S::kKeys; ++inside) {
                const int row = group * S::kKeys + inside;
                const char* at = tile(stage, 1) + swizzle<S::kRowBytes>(row, chunk) + lane % 4 * 4;
                add_word(state, rows, chunk, first_key + inside, load_shared(reinterpret_cast<const uint32_t*>(at)),
                         token_scale(stage, row));
            }
        }
    }

    PW_DEVICE float token_scale(int stage, int key) const {
        return p.v.scale.kind == ScaleKind::kTokenHead ? load_shared(key_scale(stage, 1, key)) : 1.0f;
    }

    // `word`: the elements of a chunk of V that column_of gives this thread.
    PW_DEVICE static void add_word(State& state, const Rows& rows, int chunk, int key, uint32_t word, float scale) {
        constexpr int kBits = 8 * static_cast<int>(sizeof(KV));
        const uint32_t found = is_finite(scale) ? non_finite<KV>(word) : ~0u;
        if (found == 0) return;
        PW_UNROLL
        for (int e = 0; e < kCount; ++e) {
            if (!(found >> (kBits * (e + 1) - 1) & 1)) continue;
            KV element;
            element.bits = static_cast<decltype(element.bits)>(word >> kBits * e);
            const float y = to_float(element) * scale;
            const int n = S::kQuantised ? 2 * chunk + e % 2 : chunk;
            const int i = S::kQuantised ? e / 2 : e;
            if (rows.sees(0, key)) state.out[n][i] += y;
            if (rows.sees(1, key)) state.out[n][i + 2] += y;
        }
    }

    template <int kTiles>
    PW_DEVICE static void pack_weights(uint32_t (&a)[kTiles / 2][4], const float (&x)[kTiles][4]) {
        PW_UNROLL
        for (int step = 0; step < kTiles / 2; ++step) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&pair)[4] = x[2 * step + i / 2];
                a[step][i] = Operand<Q>::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
    }

    // kClean: elements of V that are not finite count as 0.
    template <bool kClean, int kSteps>
    PW_DEVICE void accumulate(const uint32_t (&a)[kSteps][4], State& state, const char* v, int first) const {
        constexpr bool kBFloat16 = Operand<Q>::kBFloat16;
        if constexpr (S::kQuantised) {
            // a chunk holds 16 columns; transposing byte pairs gives columns 2g and 2g + 1 of keys
            // 2t and 2t + 1
            PW_UNROLL
            for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
                if (chunk * 16 >= p.v.width) break;
                uint32_t r[4];
                load_matrices_transposed(r, v + swizzle<S::kRowBytes>(first + lane, chunk));
                clean<kClean, KV>(r);
                uint32_t even[4], odd[4];
                PW_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const uint32_t sorted = permute_bytes(r[i], 0, 0x3120);
                    even[i] = widen<Q>(sorted & 0xffff, KV{});
                    odd[i] = widen<Q>(sorted >> 16, KV{});
                }
                PW_UNROLL
                for (int step = 0; step < 2; ++step) {
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk], a[step], even[2 * step], even[2 * step + 1]);
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk + 1], a[step], odd[2 * step], odd[2 * step + 1]);
                }
            }
        } else {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; n += 2) {
                if (n * 8 >= p.v.width) break;
                uint32_t b[4];
                load_matrices_transposed(b, v + swizzle<S::kRowBytes>(first + lane % 16, n + lane / 16));
                clean<kClean, KV>(b);
                multiply_accumulate<kBFloat16>(state.out[n], a[0], b[0], b[1]);
                multiply_accumulate<kBFloat16>(state.out[n + 1], a[0], b[2], b[3]);
            }
        }
    }

    template <bool kClean, class T>
    PW_DEVICE static void clean(uint32_t (&words)[4]) {
        if constexpr (kClean) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) words[i] = finite_only<T>(words[i]);
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
