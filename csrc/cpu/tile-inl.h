// Attention of many rows: a tile of query rows against blocks of keys, K and V packed once per
// block and multiplied by a GEMM; FmaTile is the one every target has, over fp32 panels. Bound by
// arithmetic. Included inside the anonymous namespace of a target.

constexpr int kPanel = kGemmVecs * kLanes;  // columns of a panel

// C[MR, kPanel] = A[MR, K] . B[K, kPanel], added to C * rescale if that is given.
template <int MR>
__attribute__((noinline)) void gemm_block(const float* a, int64_t lda, const float* b, int64_t depth, float* c,
                                          int64_t ldc, const float* rescale) {
    F acc[MR][kGemmVecs];
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int u = 0; u < kGemmVecs; ++u) {
            acc[r][u] = rescale == nullptr ? zero() : mul(load(c + r * ldc + u * kLanes), set1(rescale[r]));
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        F row[kGemmVecs];
#pragma GCC unroll 4
        for (int u = 0; u < kGemmVecs; ++u) row[u] = load(b + k * kPanel + u * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < MR; ++r) {
            const F x = set1(a[r * lda + k]);
#pragma GCC unroll 4
            for (int u = 0; u < kGemmVecs; ++u) acc[r][u] = fma(x, row[u], acc[r][u]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int u = 0; u < kGemmVecs; ++u) store(c + r * ldc + u * kLanes, acc[r][u]);
    }
}

// C[rows, columns] over panels of B; ldc has room for whole panels.
inline void gemm(const float* a, int64_t lda, int64_t rows, const float* panels, int64_t panel_stride, int64_t depth,
                 int64_t columns, float* c, int64_t ldc, const float* rescale) {
    for (int64_t j = 0; j < columns; j += kPanel, panels += panel_stride) {
        for (int64_t r = 0; r < rows; r += kGemmRows) {
            const float* scale = rescale == nullptr ? nullptr : rescale + r;
            with_constant<1, 2, 3, 4, 5, 6>(clip(rows - r, 1, kGemmRows), [&](auto MR) {
                gemm_block<MR.value>(a + r * lda, lda, panels, depth, c + r * ldc + j, ldc, scale);
            });
        }
    }
}

// K transposed: element d of key j at panels[j / kPanel][d][j % kPanel].
template <class T, int kKeys>
void pack_keys(const KeyBlock<kKeys>& keys, int64_t width, float* panels) {
    for (int j = 0; j < keys.num_keys; j += kLanes) {
        float* column = panels + j / kPanel * width * kPanel + j % kPanel;
        for (int64_t d = 0; d < width; d += kLanes) {
            const int n = clip(width - d, 0, kLanes);
            F x[kLanes];
            for (int i = 0; i < kLanes; ++i) x[i] = load_some(reinterpret_cast<const T*>(keys.k[j + i]) + d, n);
            transpose(x);
            for (int i = 0; i < n; ++i) store(column + (d + i) * kPanel, x[i]);
        }
    }
}

// Element d of key j at panels[d / kPanel][j][d % kPanel]; columns past the width are 0.
template <class T, int kKeys>
void pack_values(const KeyBlock<kKeys>& keys, int64_t width, float* panels) {
    for (int64_t d = 0; d < round_up(width, kPanel); d += kLanes) {
        float* column = panels + d / kPanel * kKeys * kPanel + d % kPanel;
        const int n = clip(width - d, 0, kLanes);
        for (int j = 0; j < keys.num_keys; ++j) {
            const F x = n == 0 ? zero() : load_some(reinterpret_cast<const T*>(keys.v[j]) + d, n);
            store(column + j * kPanel, x);
        }
    }
}

// acc = acc * rescale + weights . V over keys [begin, end) of a block.
template <class T, int kKeys>
__attribute__((noinline)) void add_some_values(const KeyBlock<kKeys>& keys, int begin, int end, int64_t width,
                                               const float* weights, float rescale, float* acc) {
    for (int64_t d = 0; d < width; d += kLanes) {
        F sum = mul(load(acc + d), set1(rescale));
        for (int i = begin; i < end; ++i) {
            const T* value = reinterpret_cast<const T*>(keys.v[i]) + d;
            sum = fma(set1(weights[i]), load_some(value, clip(width - d, 0, kLanes)), sum);
        }
        store(acc + d, sum);
    }
}

// The two products of a tile in fp32: how queries, keys and values lie in the scratch.
template <class T>
struct FmaTile {
    using Value = T;
    static constexpr int kKeys = 128;                // keys of a block
    static constexpr int kKeyStep = kLanes;          // keys of a block are padded to it
    static constexpr int64_t kRowBlock = kTileRows;  // rows that go from logits to result together

    const TileScratch& s;
    const int64_t D, Dv;

    void take_query(int64_t r, DType dtype, const char* row) const { load_row(dtype, row, D, s.q + r * D); }
    void pack(const KeyBlock<kKeys>& keys) const {
        pack_keys<T>(keys, D, s.keys);
        pack_values<T>(keys, Dv, s.values);
    }
    void logits(int64_t row, int64_t rows, int num_keys) const {
        gemm(s.q + row * D, D, rows, s.keys, D * kPanel, D, num_keys, s.logits, kKeys, nullptr);
    }
    // Takes the weights of row `r` of the rows at hand: here they replace their logits.
    auto put_weights(int64_t r) const {
        return [row = s.logits + r * kKeys](int key, F x) { store(row + key, x); };
    }
    void add_values(int64_t row, int64_t rows, int num_keys) const {
        gemm(s.logits, kKeys, rows, s.values, kKeys * kPanel, num_keys, Dv, s.acc + row * s.ld_acc, s.ld_acc,
             s.rescale + row);
    }
};

template <class Tile>
// NOLINTNEXTLINE(readability-function-cognitive-complexity): one walk whose state every part needs
void attend_tile(const AttentionParams& p, const Piece& piece, char* scratch) {
    constexpr int kKeys = Tile::kKeys;
    const int64_t group = p.q.num_heads / p.k.num_kv_heads;
    const int64_t R = (piece.row_end - piece.row_begin) * group;
    const int64_t head = piece.head_begin;
    const int64_t D = p.k.width;
    const int64_t Dv = p.v.width;
    TileScratch s;
    Carver carver{scratch};
    s.carve(carver, R, D, Dv);

    const Tile tile{s, D, Dv};
    for (int64_t r = 0; r < R; ++r) {  // row r: token r / group, head r % group of its group
        const int64_t row = piece.row_begin + r / group;
        const int64_t qo_head = head * group + r % group;
        tile.take_query(r, p.q.dtype,
                        p.q.data + (row * p.q.stride_row + qo_head * p.q.stride_head) * item_size(p.q.dtype));
    }
    __builtin_memset(s.acc, 0, R * s.ld_acc * sizeof(float));
    for (int64_t r = 0; r < round_up(R, kAlign); ++r) {
        s.top[r] = -infinity();
        s.total[r] = 0.0f;
    }

    const bool token_k = p.k_scale.kind == ScaleKind::kTokenHead;
    const bool token_v = p.v_scale.kind == ScaleKind::kTokenHead;
    const KeyRange all = keys_all_see(p, piece.seq_len, piece.position, piece.row_end - piece.row_begin);
    KeyBlock<kKeys> keys;
    for (int64_t begin = piece.key_begin; begin < piece.key_end; begin += kKeys) {
        keys.locate(p, piece, begin, kKeys, piece.head_begin);
        tile.pack(keys);
        for (int i = 0; (token_k || token_v) && i < kKeys; ++i) {
            const bool real = i < keys.num_keys;
            if (token_k) s.k_scale[i] = real ? *p.k_scale.at(keys.page[i], keys.offset[i], head) : 0.0f;
            if (token_v) s.v_scale[i] = real ? *p.v_scale.at(keys.page[i], keys.offset[i], head) : 0.0f;
        }
        // the weight of a key that a row does not see is 0, and 0 * inf is NaN
        const bool row_by_row =
            (begin < all.begin || begin + keys.num_keys > all.end) &&
            any_non_finite<typename Tile::Value>(keys.v, keys.num_keys, 0, Dv, token_v ? s.v_scale : nullptr);
        LogitRule rule{p.softmax_scale * (token_k ? 1.0f : p.k_scale.of(piece.request, head)),
                       token_k ? s.k_scale : nullptr, p.softcap};
        float* block_top = s.rescale;
        for (int64_t r = R; r < round_up(R, kLanes); ++r) block_top[r] = -infinity();
        for (int64_t first = 0; first < R; first += Tile::kRowBlock) {
            const int64_t rows = R - first < Tile::kRowBlock ? R - first : Tile::kRowBlock;
            // the last row sees furthest
            const int64_t last = piece.position + (first + rows - 1) / group;
            const int num_keys = clip(visible_keys(p, piece.seq_len, last).end - begin, 0, keys.num_keys);
            const int columns = int(round_up(num_keys, Tile::kKeyStep));
            if (num_keys == 0) continue;
            tile.logits(first, rows, num_keys);
            int64_t token = first / group;
            int64_t member = first % group;
            for (int64_t r = first; r < first + rows; ++r) {
                const int64_t position = piece.position + token;
                const KeyRange seen = visible_keys(p, piece.seq_len, position);
                rule.slope = slope_of(p, piece.request, head * group + member);
                rule.distance = float(position - begin);
                rule.begin = clip(seen.begin - begin, 0, num_keys);
                rule.end = clip(seen.end - begin, 0, num_keys);
                const RuledRow ruled = apply_rule(rule, s.logits + (r - first) * kKeys, columns);
                block_top[r] = ruled.top;
                s.unit[r] = ruled.unit;
                if (++member == group) {
                    member = 0;
                    ++token;
                }
            }
            raise_tops(s.top + first, block_top + first, s.rescale + first, int(rows));
            const auto weigh_row = [&](int64_t r, auto put) {
                const float added = weigh(s.logits + (r - first) * kKeys, columns, s.unit[r], s.top[r],
                                          token_v ? s.v_scale : nullptr, put);
                s.total[r] = s.total[r] * s.rescale[r] + added;
            };
            if (!row_by_row) {
                for (int64_t r = first; r < first + rows; ++r) weigh_row(r, tile.put_weights(r - first));
                tile.add_values(first, rows, num_keys);
                continue;
            }
            for (int64_t r = first; r < first + rows; ++r) {
                float* weights = s.logits + (r - first) * kKeys;
                weigh_row(r, [weights](int key, F x) { store(weights + key, x); });
                const KeyRange seen = visible_keys(p, piece.seq_len, piece.position + r / group);
                add_some_values<typename Tile::Value>(keys, clip(seen.begin - begin, 0, num_keys),
                                                      clip(seen.end - begin, 0, num_keys), Dv, weights, s.rescale[r],
                                                      s.acc + r * s.ld_acc);
            }
        }
    }

    const float v_scale = token_v ? 1.0f : p.v_scale.of(piece.request, head);
    for (int64_t r = 0; r < R; ++r) {
        finish_row(p, piece, piece.row_begin + r / group, head * group + r % group, s.acc + r * s.ld_acc, s.top[r],
                   s.total[r], v_scale);
    }
}
