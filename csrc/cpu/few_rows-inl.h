// Attention of a few rows per kv head: decode, speculative verification, short chunks. Bound by
// memory: every KV byte is read once for all rows of its group, K and V straight from the pages,
// and widened once per row block in registers.

// Addresses of head 0's rows of a block of keys; entries past num_keys repeat the last, so that
// tiles need no tail.
struct KeyBlock {
    int64_t begin;
    int num_keys;
    const char *k[kKeyBlock], *v[kKeyBlock];
    int64_t page[kKeyBlock], offset[kKeyBlock];

    void locate(const AttentionParams& p, const Piece& piece, int64_t at) {
        begin = at;
        num_keys = clip(piece.key_end - at, 0, kKeyBlock);
        const int64_t item = item_size(p.k.dtype);
        for (int i = 0; i < num_keys;) {
            const int64_t entry = (at + i) / p.k.page_size,
                          id = p.page_table.at(piece.request, entry);
            int64_t slot = at + i - entry * p.k.page_size;
            for (; i < num_keys && slot < p.k.page_size; ++i, ++slot) {
                page[i] = id;
                offset[i] = slot;
                k[i] = p.k.data + (id * p.k.stride_page + slot * p.k.stride_token) * item;
                v[i] = p.v.data + (id * p.v.stride_page + slot * p.v.stride_token) * item;
            }
        }
        for (int i = num_keys; i < kKeyBlock && i > 0; ++i) {
            k[i] = k[i - 1];
            v[i] = v[i - 1];
        }
    }
};

// Position i of a row in registers holds element order(i): wide loads permute inside the whole wide
// blocks.
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

// Where the rows of the next step are, fetched line by line while this one computes.
struct Ahead {
    const char* const* rows;
    int64_t byte;
};

// logits[r][key] = q[r] . K[key] for RB rows.
template <class T, int RB>
__attribute__((noinline)) void dot_rows(const KeyBlock& block, int64_t byte, int64_t width,
                                        const float* q, int64_t ld_q, float* logits, Ahead ahead) {
    constexpr int KT = kTileAccs / RB, kVecs = Wide<T>::kVecs, kWide = kVecs * kLanes;
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
            __builtin_memcpy(logits + r * kKeyBlock + key, flat + r * KT, KT * sizeof(float));
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
template <class T, int RB, int NV>
__attribute__((noinline)) void add_columns(const KeyBlock& block, int64_t byte, int64_t d,
                                           const float* weights, const float* rescale, float* acc,
                                           int64_t ld_acc, Ahead ahead) {
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
            const F w = set1(weights[r * kKeyBlock + key]);
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

template <class T, int RB>
inline void add_values(const KeyBlock& block, int64_t byte, int64_t width, const float* weights,
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
                a[r] = fma(set1(weights[r * kKeyBlock + key]), x, a[r]);
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

template <class T>
void attend_few_rows(const AttentionParams& p, const Piece& piece, char* scratch) {
    const int64_t group = p.q.num_heads / p.k.num_kv_heads,
                  tokens = piece.row_end - piece.row_begin, R = tokens * group;
    const int64_t H = piece.head_end - piece.head_begin, D = p.k.width, Dv = p.v.width,
                  item = sizeof(T);
    FewRowsScratch s;
    Arena arena{scratch};
    s.carve(arena, H, R, D, Dv);
    const int64_t R_padded = round_up(R, kAlign);

    for (int64_t h = 0; h < H;
         ++h) {  // row r of head h: token r / group, head r % group of its group
        for (int64_t r = 0; r < R; ++r) {
            const int64_t row = piece.row_begin + r / group,
                          qo_head = (piece.head_begin + h) * group + r % group;
            load_row(p.q.dtype,
                     p.q.data +
                         (row * p.q.stride_row + qo_head * p.q.stride_head) * item_size(p.q.dtype),
                     D, s.row);
            float* q = s.q + (h * R + r) * s.ld_q;
            for (int64_t i = 0; i < D; ++i) q[i] = s.row[order<T>(i, D)] * factor<T>(i, D);
            for (int64_t i = D; i < s.ld_q; ++i) q[i] = 0.0f;
        }
        for (int64_t i = 0; i < R_padded; ++i) s.top[h * R_padded + i] = -infinity();
        for (int64_t i = 0; i < R_padded; ++i) s.total[h * R_padded + i] = 0.0f;
    }
    __builtin_memset(s.acc, 0, H * R * s.ld_acc * sizeof(float));

    const bool token_k = p.k_scale.kind == ScaleKind::kTokenHead,
               token_v = p.v_scale.kind == ScaleKind::kTokenHead;
    KeyBlock blocks[2];
    blocks[0].locate(p, piece, piece.key_begin);
    for (int turn = 0; blocks[turn].num_keys > 0; turn ^= 1) {
        const KeyBlock& block = blocks[turn];
        KeyBlock& following = blocks[turn ^ 1];
        following.locate(p, piece, block.begin + block.num_keys);
        const int padded = int(round_up(block.num_keys, kLanes));
        for (int64_t h = 0; h < H; ++h) {
            const int64_t head = piece.head_begin + h;
            const int64_t k_byte = head * p.k.stride_head * item,
                          v_byte = head * p.v.stride_head * item;
            if (token_k || token_v) {
                for (int i = 0; i < padded; ++i) {
                    const bool real = i < block.num_keys;
                    if (token_k)
                        s.k_scale[i] =
                            real ? *p.k_scale.at(block.page[i], block.offset[i], head) : 0.0f;
                    if (token_v)
                        s.v_scale[i] =
                            real ? *p.v_scale.at(block.page[i], block.offset[i], head) : 0.0f;
                }
            }
            const bool last_head = h + 1 == H;  // the next step is the next head or the next keys
            const KeyBlock& next = last_head && following.num_keys > 0 ? following : block;
            const int64_t next_head = last_head ? piece.head_begin : head + 1;
            const Ahead next_k{next.k, next_head * p.k.stride_head * item};
            const Ahead next_v{next.v, next_head * p.v.stride_head * item};
            const float* q = s.q + h * R * s.ld_q;
            over_row_blocks(R, [&](auto RB, int64_t r) {
                dot_rows<T, RB.value>(block, k_byte, D, q + r * s.ld_q, s.ld_q,
                                      s.logits + r * kKeyBlock, next_k);
            });
            float *top = s.top + h * R_padded, *total = s.total + h * R_padded,
                  *block_top = s.rescale;
            LogitRule rule{p.softmax_scale * (token_k ? 1.0f : p.k_scale.of(piece.request, head)),
                           token_k ? s.k_scale : nullptr,
                           p.softcap,
                           0.0f,
                           0.0f,
                           0,
                           0};
            for (int64_t r = 0; r < R; ++r) {
                const int64_t position = piece.position + r / group;
                const KeyRange seen = visible_keys(p, piece.seq_len, position);
                rule.slope = slope_of(p, piece.request, head * group + r % group);
                rule.distance = float(position - block.begin);
                rule.begin = clip(seen.begin - block.begin, 0, block.num_keys);
                rule.end = clip(seen.end - block.begin, 0, block.num_keys);
                const RuledRow ruled = apply_rule(rule, s.logits + r * kKeyBlock, block.num_keys);
                block_top[r] = ruled.top;
                s.unit[r] = ruled.unit;
            }
            for (int64_t r = R; r < round_up(R, kLanes); ++r) block_top[r] = -infinity();
            raise_tops(top, block_top, s.rescale, int(R));
            for (int64_t r = 0; r < R; ++r) {
                float* logits = s.logits + r * kKeyBlock;
                const float added =
                    weigh(logits, block.num_keys, s.unit[r], top[r], token_v ? s.v_scale : nullptr,
                          [logits](int key, F weights) { store(logits + key, weights); });
                total[r] = total[r] * s.rescale[r] + added;
            }
            float* acc = s.acc + h * R * s.ld_acc;
            over_row_blocks(R, [&](auto RB, int64_t r) {
                add_values<T, RB.value>(block, v_byte, Dv, s.logits + r * kKeyBlock, s.rescale + r,
                                        acc + r * s.ld_acc, s.ld_acc, next_v);
            });
        }
    }

    for (int64_t h = 0; h < H; ++h) {
        const int64_t head = piece.head_begin + h;
        const float v_scale = token_v ? 1.0f : p.v_scale.of(piece.request, head);
        for (int64_t r = 0; r < R; ++r) {
            const float* acc = s.acc + (h * R + r) * s.ld_acc;
            for (int64_t i = 0; i < Dv; ++i) s.row[order<T>(i, Dv)] = acc[i] * factor<T>(i, Dv);
            finish_row(p, piece, piece.row_begin + r / group, head * group + r % group, s.row,
                       s.top[h * R_padded + r], s.total[h * R_padded + r], v_scale);
        }
    }
}
