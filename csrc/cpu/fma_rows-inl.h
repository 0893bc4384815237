// A few rows in fp32, as every target has it: K and V are widened once per row block in registers.

// Position i of a row in registers holds element order(i): wide loads permute inside the whole wide blocks.
template <class T>
inline int64_t order(int64_t i, int64_t width) {
    constexpr int kWide = Wide<T>::kVecs * kLanes;
    const int64_t base = i / kWide * kWide;
    return base + kWide <= width ? base + Wide<T>::source(int(i - base)) : i;
}

// The true value of what stands at position i.
template <class T>
inline float factor(int64_t i, int64_t width) {
    constexpr int kWide = Wide<T>::kVecs * kLanes;
    return i / kWide * kWide + kWide <= width ? Wide<T>::kFactor : 1.0f;
}

// logits[r][key] = q[r] . K[key] for RB rows.
template <class T, int RB, int kKeys>
// NOLINTNEXTLINE(readability-function-cognitive-complexity): the nests are one register block, unrolled
__attribute__((noinline)) void dot_rows(const KeyBlock<kKeys>& block, int64_t byte, int64_t width, const float* q,
                                        int64_t ld_q, float* logits, Ahead ahead) {
    constexpr int KT = kTileAccs / RB;
    constexpr int kVecs = Wide<T>::kVecs;
    constexpr int kWide = kVecs * kLanes;
    constexpr int kSums = (RB * KT + kLanes - 1) / kLanes;
    for (int key = 0; key < block.num_keys; key += KT) {
        F acc[kSums * kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kSums * kLanes; ++i) acc[i] = zero();
        int64_t d = 0;
        for (; d + kWide <= width; d += kWide) {
#pragma GCC unroll 16
            for (int j = 0; j < KT; ++j) {
                F x[kVecs];
                Wide<T>::load(reinterpret_cast<const T*>(block.k[key + j] + byte) + d, x);
                prefetch(ahead.rows[key + j] + ahead.byte + d * int64_t(sizeof(T)));
#pragma GCC unroll 4
                for (int u = 0; u < kVecs; ++u) {
#pragma GCC unroll 4
                    for (int r = 0; r < RB; ++r) {
                        F& sum = acc[r * KT + j];
                        sum = fma(x[u], load(q + r * ld_q + d + u * kLanes), sum);
                    }
                }
            }
        }
        for (; d < width; d += kLanes) {
            const int n = clip(width - d, 0, kLanes);
#pragma GCC unroll 16
            for (int j = 0; j < KT; ++j) {
                const F x = load_some(reinterpret_cast<const T*>(block.k[key + j] + byte) + d, n);
#pragma GCC unroll 4
                for (int r = 0; r < RB; ++r) {
                    acc[r * KT + j] = fma(x, load(q + r * ld_q + d), acc[r * KT + j]);
                }
            }
        }
        alignas(64) float flat[kSums * kLanes];
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i) store(flat + i * kLanes, sums(acc + i * kLanes));
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) {
            __builtin_memcpy(logits + r * kKeys + key, flat + r * KT, KT * sizeof(float));
        }
    }
}

template <class T, int NV>
inline void load_values(const T* p, F* x) {
    if constexpr (NV >= Wide<T>::kVecs) {
#pragma GCC unroll 8
        for (int u = 0; u < NV; u += Wide<T>::kVecs) Wide<T>::load(p + u * kLanes, x + u);
    } else {
        x[0] = load(p);
    }
}

// acc[r][d ..] = acc * rescale + weights[r] . V over NV whole vectors of columns.
template <class T, int RB, int NV, int kKeys>
__attribute__((noinline)) void add_columns(const KeyBlock<kKeys>& block, int64_t byte, int64_t d, const float* weights,
                                           const float* rescale, float* acc, int64_t ld_acc, Ahead ahead) {
    F a[RB][NV];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
#pragma GCC unroll 8
        for (int u = 0; u < NV; ++u) {
            a[r][u] = mul(load(acc + r * ld_acc + d + u * kLanes), set1(rescale[r]));
        }
    }
    for (int key = 0; key < block.num_keys; ++key) {
        const char* next = ahead.rows[key] + ahead.byte + d * int64_t(sizeof(T));
#pragma GCC unroll 8
        for (int i = 0; i < int(NV * kLanes * sizeof(T)); i += 64) prefetch(next + i);
        F x[NV];
        load_values<T, NV>(reinterpret_cast<const T*>(block.v[key] + byte) + d, x);
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) {
            const F w = set1(weights[r * kKeys + key]);
#pragma GCC unroll 8
            for (int u = 0; u < NV; ++u) a[r][u] = fma(w, x[u], a[r][u]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
#pragma GCC unroll 8
        for (int u = 0; u < NV; ++u) store(acc + r * ld_acc + d + u * kLanes, a[r][u]);
    }
}

template <class T, int RB, int kKeys>
inline void add_values(const KeyBlock<kKeys>& block, int64_t byte, int64_t width, const float* weights,
                       const float* rescale, float* acc, int64_t ld_acc, Ahead ahead) {
    constexpr int kVecs = Wide<T>::kVecs;
    constexpr int kMost = kTileAccs / RB > 8 ? 8 : kTileAccs / RB;
    int64_t d = 0;
    for (; d + kMost * kLanes <= width; d += kMost * kLanes) {
        add_columns<T, RB, kMost>(block, byte, d, weights, rescale, acc, ld_acc, ahead);
    }
    if constexpr (kVecs < kMost) {
        for (; d + kVecs * kLanes <= width; d += kVecs * kLanes) {
            add_columns<T, RB, kVecs>(block, byte, d, weights, rescale, acc, ld_acc, ahead);
        }
    }
    for (; d < width; d += kLanes) {
        const int n = clip(width - d, 0, kLanes);
        F a[RB];
        for (int r = 0; r < RB; ++r) a[r] = mul(load(acc + r * ld_acc + d), set1(rescale[r]));
        for (int key = 0; key < block.num_keys; ++key) {
            const F x = load_some(reinterpret_cast<const T*>(block.v[key] + byte) + d, n);
            for (int r = 0; r < RB; ++r) {
                a[r] = fma(set1(weights[r * kKeys + key]), x, a[r]);
            }
        }
        for (int r = 0; r < RB; ++r) store(acc + r * ld_acc + d, a[r]);
    }
}

// Calls f(Constant<RB>{}, first row) over blocks of at most kMaxRowBlock rows.
template <class Body>
inline void over_row_blocks(int64_t num_rows, Body body) {
    int64_t r = 0;
    for (; r + kMaxRowBlock <= num_rows; r += kMaxRowBlock) body(Constant<kMaxRowBlock>{}, r);
    if constexpr (kMaxRowBlock > 2) {
        if (num_rows - r >= 2) {
            body(Constant<2>{}, r);
            r += 2;
        }
    }
    if (num_rows - r == 1) body(Constant<1>{}, r);
}

// The softmax and the two products of a few rows; see attend_few.
template <class T>
struct FmaRows {
    // 16 KiB of K and V of 128 elements: fetched at once, more of it runs late.
    static constexpr int kKeys = kMaxKeyBlock / int(sizeof(T));

    const FewRows& f;
    const FewRowsScratch& s = f.s;
    const int64_t R = f.R, D = f.D, Dv = f.Dv;

    float* q(int64_t h, int64_t r) const { return s.q + (h * R + r) * s.ld_q; }
    float* acc(int64_t h, int64_t r) const { return s.acc + (h * R + r) * s.ld_acc; }
    float* top(int64_t h) const { return s.top + h * round_up(R, kAlign); }
    float* total(int64_t h) const { return s.total + h * round_up(R, kAlign); }

    void take_query(int64_t h, int64_t r, const char* row) const {
        load_row(f.p.q.dtype, row, D, s.row);
        float* to = q(h, r);
        for (int64_t i = 0; i < D; ++i) to[i] = s.row[order<T>(i, D)] * factor<T>(i, D);
        for (int64_t i = D; i < s.ld_q; ++i) to[i] = 0.0f;
    }

    void add_block(const Step<kKeys>& step) const {
        const KeyBlock<kKeys>& block = step.block;
        over_row_blocks(R, [&](auto RB, int64_t r) {
            dot_rows<T, RB.value>(block, step.k_byte, D, q(step.h, r), s.ld_q, s.logits + r * kKeys, step.next_k);
        });
        apply_rules(step);
        float* tops = top(step.h);
        float* totals = total(step.h);
        raise_tops(tops, s.rescale, s.rescale, int(R));
        for (int64_t r = 0; r < R; ++r) {
            float* weights = s.logits + r * kKeys;
            const float added = weigh(weights, block.num_keys, s.unit[r], tops[r], f.token_v ? s.v_scale : nullptr,
                                      [weights](int key, F x) { store(weights + key, x); });
            totals[r] = totals[r] * s.rescale[r] + added;
        }
        if (f.template row_by_row<T>(step)) return add_seen_values(step);
        over_row_blocks(R, [&](auto RB, int64_t r) {
            add_values<T, RB.value>(block, step.v_byte, Dv, s.logits + r * kKeys, s.rescale + r, acc(step.h, r),
                                    s.ld_acc, step.next_v);
        });
    }

    // Each row against the keys that it sees, as a block of their own.
    __attribute__((noinline)) void add_seen_values(const Step<kKeys>& step) const {
        for (int64_t r = 0; r < R; ++r) {
            const BlockRange seen = f.seen(r, step.block);
            KeyBlock<kKeys> block;
            block.num_keys = seen.end - seen.begin;
            for (int i = 0; i < block.num_keys; ++i) block.v[i] = step.block.v[seen.begin + i];
            add_values<T, 1>(block, step.v_byte, Dv, s.logits + r * kKeys + seen.begin, s.rescale + r, acc(step.h, r),
                             s.ld_acc, step.next_v);
        }
    }

    // Leaves the rows' maxima in s.rescale and their units in s.unit.
    void apply_rules(const Step<kKeys>& step) const {
        const KeyBlock<kKeys>& block = step.block;
        LogitRule rule{f.logit_scale(step.h), f.token_k ? s.k_scale : nullptr, f.p.softcap};
        for (int64_t r = 0; r < R; ++r) {
            const BlockRange seen = f.seen(r, block);
            rule.slope = f.slope(step.h, r);
            rule.distance = float(f.position(r) - block.begin);
            rule.begin = seen.begin;
            rule.end = seen.end;
            const RuledRow ruled = apply_rule(rule, s.logits + r * kKeys, block.num_keys);
            s.rescale[r] = ruled.top;
            s.unit[r] = ruled.unit;
        }
        for (int64_t r = R; r < round_up(R, kLanes); ++r) s.rescale[r] = -infinity();
    }

    void finish(int64_t h, int64_t r) const {
        for (int64_t i = 0; i < Dv; ++i) s.row[order<T>(i, Dv)] = acc(h, r)[i] * factor<T>(i, Dv);
        f.finish(h, r, top(h)[r], total(h)[r]);
    }
};
