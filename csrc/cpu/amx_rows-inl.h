// Attention of up to 16 bf16 rows of a kv head with AMX. 16 keys are the left side of K . q, loaded
// from the pages as they lie there; weights . V needs the values of two keys side by side. Products
// and weights stay as tiles leave them, all rows of a key together, through the whole softmax. So a
// key costs nearly the same for one row as for 16, well below what it costs to bring it from
// memory. Included inside the anonymous namespace of target_amx.cpp.

// Tile registers: 0 products of 16 keys with q, 1 q, 2 keys or values, 3 weights, 4-7 sums.
struct FewRowsTiles {
    FewRowsTiles(int64_t R, int64_t columns) {
        TileConfig config;
        config.row_bytes[0] = config.row_bytes[1] = uint16_t(columns * int64_t(sizeof(float)));
        for (int i = 3; i < 8; ++i) config.rows[i] = uint8_t(R);
        _tile_loadconfig(&config);
    }
    ~FewRowsTiles() { _tile_release(); }
    FewRowsTiles(const FewRowsTiles&) = delete;
};

inline void settle() { asm volatile("" ::: "memory"); }  // tile loads do not say that they read

// ---- softmax of R <= C rows in vectors of [kLanes / C keys][C rows]

// What the lanes of a row make together, in all of them.
template <int C, F (*op)(F, F)>
inline F over_keys(F x) {
    if constexpr (C == 4) {
        x = op(x, _mm512_shuffle_f32x4(x, x, 0x4e));
        x = op(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    }
    return x;
}

// C vectors of 16 keys become vectors of a row each.
template <int C>
inline void turn(F* x) {
    if constexpr (C == 4) {
        const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
        const F a = _mm512_permutex2var_ps(x[0], even, x[1]);
        const F b = _mm512_permutex2var_ps(x[2], even, x[3]);
        const F c = _mm512_permutex2var_ps(x[0], odd, x[1]);
        const F d = _mm512_permutex2var_ps(x[2], odd, x[3]);
        x[0] = _mm512_shuffle_f32x4(a, b, 0x44);
        x[1] = _mm512_shuffle_f32x4(a, b, 0xee);
        x[2] = _mm512_shuffle_f32x4(c, d, 0x44);
        x[3] = _mm512_shuffle_f32x4(c, d, 0xee);
    } else {
        transpose(x);
    }
}

// The keys of vector i of a block, `of` being one number per key.
template <int C>
inline F per_key(const float* of, int i) {
    if constexpr (C == kLanes) return set1(of[i]);
    const __m512i key = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(key, _mm512_castps128_ps512(_mm_loadu_ps(of + i * kLanes / C)));
}

// The softmax and the two products of up to C rows in bf16; see attend_few.
template <class T, int C>
struct AmxRows {
    static constexpr int kKeys = kTileDepth;          // few, so that fetching never pauses for long
    static constexpr int kVecs = kKeys * C / kLanes;  // of products

    const FewRows& f;
    const FewRowsScratch& s = f.s;
    const int64_t R = f.R, D = f.D, Dv = f.Dv;
    const int64_t depth = round_up(D, kChunk) / kTileDepth;
    const Words<T> words{};
    const FewRowsTiles registers{R, C};

    BFloat16* q(int64_t h) const {  // tiles of [16 pairs of elements][16 rows][2]
        return reinterpret_cast<BFloat16*>(s.tiles) + h * depth * kTileSize;
    }
    BFloat16* keys() const { return q(f.H); }                        // [16][elements]
    BFloat16* values() const { return keys() + depth * kTileSize; }  // a tile for each column
    BFloat16* weights() const { return values() + 4 * kTileSize; }   // a tile
    float* acc(int64_t h, int64_t r) const { return s.acc + (h * R + r) * s.ld_acc; }
    float* top(int64_t h) const { return s.top + h * kAlign; }
    float* total(int64_t h) const { return s.total + h * kAlign; }

    void take_query(int64_t h, int64_t r, const char* row) const {
        if (r == 0) __builtin_memset(q(h), 0, depth * kTileSize * sizeof(BFloat16));
        auto* pairs = reinterpret_cast<uint32_t*>(s.row);
        __builtin_memset(pairs, 0, depth * kTileDepth * sizeof(BFloat16));
        __builtin_memcpy(pairs, row, D * sizeof(BFloat16));
        auto* to = reinterpret_cast<uint32_t*>(q(h)) + r;
        for (int64_t d = 0; d < D; d += kChunk, pairs += kChunk / 2) {
#pragma GCC unroll 32
            for (int i = 0; i < kChunk; i += 2, to += kTileSide)
                *to = pairs[Words<T>::source(i / kTileDepth, i % kTileDepth) / 2];
        }
    }

    __attribute__((noinline)) void add_block(const Step<kKeys>& step) const {
        alignas(64) float products[kKeys * C];  // [keys][C rows]
        for (int key = 0; key < kKeys; key += kTileSide) multiply_keys(step, key, products + key * C);
        rescale_sums(step.h, weigh_products(step, products));
        if (f.template row_by_row<T>(step)) return add_seen_values(step);
        const BlockRange every{0, step.block.num_keys};
        for (int64_t d = 0; d < Dv; d += kChunk) {
            const bool whole = Dv - d >= kChunk && step.block.num_keys == kKeys;
            whole ? pack_values<true>(step, d, every) : pack_values<false>(step, d, every);
            add_values(step.h, d, acc(step.h, 0) + d, s.ld_acc);
        }
    }

    // Each row against the keys that it sees, the others being zeros; a product has all rows, and
    // one of them is kept.
    __attribute__((noinline)) void add_seen_values(const Step<kKeys>& step) const {
        alignas(64) float sums[kTileSide * kChunk];
        for (int64_t r = 0; r < R; ++r) {
            const BlockRange seen = f.seen(r, step.block);
            for (int key = 0; key < kKeys; ++key) {  // a NaN scale makes them NaN
                if (key < seen.begin || key >= seen.end) weights()[r * kKeys + key] = BFloat16{0};
            }
            for (int64_t d = 0; d < Dv; d += kChunk) {
                pack_values<false>(step, d, seen);
                add_values(step.h, d, sums, kChunk);
                __builtin_memcpy(acc(step.h, r) + d, sums + r * kChunk, kChunk * sizeof(float));
            }
        }
    }

    void multiply_keys(const Step<kKeys>& step, int key, float* products) const {
        const KeyBlock<kKeys>& block = step.block;
        const char* const* next = step.next_k.rows + key;
        const int64_t ahead = step.next_k.byte;
        const int64_t num_tiles = depth;
        const BFloat16* query = q(step.h);
        constexpr int kLast = kTileSide - 1;
        const bool in_place = Words<T>::kAsStored && D % kChunk == 0 && key + kLast < block.num_keys &&
                              block.offset[key + kLast] == block.offset[key] + kLast;
        const char* left = block.k[key] + step.k_byte;
        int64_t stride = block.k[key + 1] - block.k[key];
        if (!in_place) {
            copy_keys(block.k + key, step.k_byte);
            left = reinterpret_cast<const char*>(keys());
            stride = depth * kTileDepth * int64_t(sizeof(BFloat16));
        }
        settle();
        _tile_zero(0);
        for (int64_t i = 0; i < num_tiles; ++i) {
            _tile_loadd(1, query + i * kTileSize, 64);
            _tile_loadd(2, left + 64 * i, stride);
            _tile_dpbf16ps(0, 2, 1);
            const int64_t line = i * kTileDepth * int64_t(sizeof(T));
            if (line % 64 != 0) continue;
#pragma GCC unroll 16
            for (int j = 0; j < kTileSide; ++j) prefetch(next[j] + ahead + line);
        }
        _tile_stored(0, products, C * int64_t(sizeof(float)));
        settle();
    }

    void copy_keys(const char* const* rows, int64_t byte) const {
        const Words<T> table = words;
        const int64_t width = depth * kTileDepth;
        const int64_t whole = D / kChunk * kChunk;
        BFloat16* to = keys();
        for (int i = 0; i < kTileSide; ++i) {
            const T* row = reinterpret_cast<const T*>(rows[i] + byte);
            for (int64_t d = 0; d < whole; d += kChunk, to += kChunk)
                put(table.template load<true>(row + d, kChunk), to, to + kTileDepth);
            if (whole == D) continue;
            put(table.template load<false>(row + whole, int(D - whole)), to, to + kTileDepth);
            to += width - whole;
        }
    }

    // Products become weights; returns what the sums so far are to be multiplied with.
    F weigh_products(const Step<kKeys>& step, float* products) const {
        const float scale = f.logit_scale(step.h);
        const bool masked =
            step.block.begin < f.all.begin || step.block.begin + kKeys > f.all.end || step.block.num_keys < kKeys;
        const bool plain =
            !masked && !f.token_k && f.p.softcap <= 0.0f && f.p.alibi_slopes.data == nullptr && scale > 0.0f;
        const F unit = set1(plain ? scale * kLog2E : 1.0f);
        if (!plain) apply_rules(step, masked, products);
        F block_top = set1(-infinity());
        for (int i = 0; i < kVecs; ++i) block_top = max(load(products + i * kLanes), block_top);
        block_top = over_keys<C, max>(mul(block_top, unit));

        const F before = load(top(step.h));
        const F after = max(before, block_top);
        const F shift = select(less(set1(-infinity()), after), sub(zero(), after), zero());
        const F rescale = exp2_negative(add(before, shift));
        F sum = mul(load(total(step.h)), rescale);
        for (int key = 0; key < kKeys; key += kLanes) {
            F x[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                x[c] = exp2_negative(fma(load(products + key * C + c * kLanes), unit, shift));
                sum = add(sum, x[c]);
                if (f.token_v) x[c] = mul(x[c], per_key<C>(s.v_scale + key, c));
            }
            turn<C>(x);
#pragma GCC unroll 16
            for (int r = 0; r < C; ++r) {  // rounded, unlike their sum
                _mm256_store_si256(reinterpret_cast<__m256i*>(weights() + r * kKeys + key),
                                   (__m256i)_mm512_cvtneps_pbh(x[r]));
            }
        }
        store(top(step.h), after);
        store(total(step.h), sum);
        return rescale;
    }

    // Products become base-2 logits, -inf where a row does not see a key.
    __attribute__((noinline)) void apply_rules(const Step<kKeys>& step, bool masked, float* products) const {
        float begin[kLanes] = {};
        float end[kLanes] = {};
        float distance[kLanes] = {};
        float slope[kLanes] = {};
        for (int i = 0; i < kLanes; ++i) {
            const int r = i % C;
            if (r >= R) continue;
            const KeyRange seen = f.seen(r);
            begin[i] = float(clip(seen.begin - step.block.begin, 0, step.block.num_keys));
            end[i] = float(clip(seen.end - step.block.begin, 0, step.block.num_keys));
            distance[i] = float(f.position(r) - step.block.begin);
            slope[i] = f.slope(step.h, r);
        }
        const F scale = set1(f.logit_scale(step.h));
        const F cap = set1(f.p.softcap);
        float number[kLanes];
        for (int i = 0; i < kLanes; ++i) number[i] = float(i / C);
        for (int i = 0; i < kVecs; ++i) {
            const F column = add(load(number), set1(float(i * kLanes / C)));
            F x = mul(load(products + i * kLanes), scale);
            if (f.token_k) x = mul(x, per_key<C>(s.k_scale, i));
            if (f.p.softcap > 0.0f) x = mul(tanh(div(x, cap)), cap);
            if (f.p.alibi_slopes.data != nullptr) x = fnma(load(slope), abs(sub(load(distance), column)), x);
            x = mul(x, set1(kLog2E));
            if (masked) {
                x = select(less(column, load(end)), x, set1(-infinity()));
                x = select(less(column, load(begin)), set1(-infinity()), x);
            }
            store(products + i * kLanes, x);
        }
    }

    void rescale_sums(int64_t h, F rescale) const {
        const M changed = _mm512_mask_cmp_ps_mask(first(int(R)), rescale, set1(1.0f), _CMP_NEQ_UQ);
        if (changed == 0) return;
        alignas(64) float factor[kLanes];
        store(factor, rescale);
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t d = 0; d < s.ld_acc; d += kLanes)
                store(acc(h, r) + d, mul(load(acc(h, r) + d), set1(factor[r])));
        }
    }

    // Elements d .. d + kChunk. Row j / 2 of a column's tile has those of keys j and j + 1 in
    // turns; zeros outside `keys`.
    template <bool kWhole>
    void pack_values(const Step<kKeys>& step, int64_t d, BlockRange keys) const {
        const Words<T> table = words;
        const auto width = [&](int j) {
            const bool in = j >= keys.begin && j < keys.end;
            return kWhole ? kChunk : in ? clip(Dv - d, 0, kChunk) : 0;
        };
        const char* const* rows = step.block.v;
        const char* const* next = step.next_v.rows;
        const int64_t byte = d * int64_t(sizeof(T));
        const int64_t here = step.v_byte + byte;
        const int64_t ahead = step.next_v.byte + byte;
        BFloat16* to = values();
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; j += 2, to += kTileDepth) {
            const Chunk a = table.template load<kWhole>(reinterpret_cast<const T*>(rows[j] + here), width(j));
            const Chunk b = table.template load<kWhole>(reinterpret_cast<const T*>(rows[j + 1] + here), width(j + 1));
            put({_mm512_unpacklo_epi16(a.x, b.x), _mm512_unpackhi_epi16(a.x, b.x)}, to, to + kTileSize);
            put({_mm512_unpacklo_epi16(a.y, b.y), _mm512_unpackhi_epi16(a.y, b.y)}, to + 2 * kTileSize,
                to + 3 * kTileSize);
#pragma GCC unroll 2
            for (int64_t line = 0; line < kChunk * int64_t(sizeof(T)); line += 64) {
                prefetch(next[j] + ahead + line);
                prefetch(next[j + 1] + ahead + line);
            }
        }
    }

    // Elements d .. d + kChunk of all rows' sums, with the values added.
    void add_values(int64_t h, int64_t d, float* to, int64_t ld_to) const {
        const int64_t row = s.ld_acc * int64_t(sizeof(float));
        const int64_t row_to = ld_to * int64_t(sizeof(float));
        const float* sums = acc(h, 0) + d;
        settle();
        _tile_loadd(4, sums, row);
        _tile_loadd(5, sums + 16, row);
        _tile_loadd(6, sums + 32, row);
        _tile_loadd(7, sums + 48, row);
        _tile_loadd(3, weights(), 64);
        _tile_loadd(2, values(), 64);
        _tile_dpbf16ps(4, 3, 2);
        _tile_loadd(2, values() + kTileSize, 64);
        _tile_dpbf16ps(5, 3, 2);
        _tile_loadd(2, values() + 2 * kTileSize, 64);
        _tile_dpbf16ps(6, 3, 2);
        _tile_loadd(2, values() + 3 * kTileSize, 64);
        _tile_dpbf16ps(7, 3, 2);
        _tile_stored(4, to, row_to);
        _tile_stored(5, to + 16, row_to);
        _tile_stored(6, to + 32, row_to);
        _tile_stored(7, to + 48, row_to);
        settle();
    }

    void finish(int64_t h, int64_t r) const {
        for (int64_t d = 0; d < Dv; d += kChunk) {
            for (int i = 0; i < kChunk; i += 4) {  // unpacking has put words 0-3 of each 8 first
                const int word = i % 16 * 2 + i / 16 % 2 * 4;
                _mm_storeu_ps(s.row + d + Words<T>::source(i / 32, word), _mm_loadu_ps(acc(h, r) + d + i));
            }
        }
        const F sum = over_keys<C, add>(load(total(h)));
        alignas(64) float sums[kLanes];
        store(sums, sum);
        f.finish(h, r, top(h)[r], sums[r]);
    }
};

// In bf16 where that loses nothing of the queries and the cache.
void attend_few_rows_bf16(const AttentionParams& p, const Piece& piece, char* scratch) {
    const int64_t group = p.q.num_heads / p.k.num_kv_heads;
    const bool four = (piece.row_end - piece.row_begin) * group <= 4;
    if (p.q.dtype != DType::kBFloat16) return attend_few_rows(p, piece, scratch);
    with_dtype(p.k.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 1 || std::is_same_v<T, BFloat16>) {
            four ? attend_few<AmxRows<T, 4>>(p, piece, scratch) : attend_few<AmxRows<T, 16>>(p, piece, scratch);
        } else {
            attend_few_rows(p, piece, scratch);
        }
    });
}
