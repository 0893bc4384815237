// Attention of many bf16 rows with AMX: operands in bf16, sums in fp32. Included inside the
// anonymous namespace of target_amx.cpp.
//
// An operand lies in tiles of 1 KiB, in the order in which the GEMM goes over them. A tile of the
// left side is [16 rows][32 of the depth]; one of the right side is [16 pairs of the depth][16
// columns][2]. Depth and columns are padded to 32, the depth with zeros on both sides. Rows are
// padded to 32 with whatever is there: no row of a product depends on another.

constexpr int kTileDepth = 32, kTileSide = 16, kTileSize = kTileDepth * kTileSide;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// The tile registers, for as long as this stands. Each thread has its own.
struct Tiles {
    Tiles() { _tile_loadconfig(&kTileConfig); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// C[rows, columns] = (add ? C : 0) + A[rows, depth] . B[depth, columns], all counted in tiles; rows
// and columns are even. a_stride: elements from one row of tiles to the next; b_stride: from one
// column of tiles to the next.
__attribute__((noinline)) inline void tile_gemm(const BFloat16* a, int64_t a_stride, int64_t rows, const BFloat16* b,
                                                int64_t b_stride, int64_t columns, int64_t depth, bool add, float* c,
                                                int64_t ldc) {
    asm volatile("" ::: "memory");  // tile loads do not say that they read memory
    const int64_t row = ldc * int64_t(sizeof(float));
    for (int64_t j = 0; j < columns; j += 2, b += 2 * b_stride) {
        for (int64_t i = 0; i < rows; i += 2) {
            const BFloat16* left = a + i * a_stride;
            float* at = c + (i * ldc + j) * kTileSide;
            float* below = at + kTileSide * ldc;
            if (add) {
                _tile_loadd(0, at, row);
                _tile_loadd(1, at + kTileSide, row);
                _tile_loadd(2, below, row);
                _tile_loadd(3, below + kTileSide, row);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int64_t k = 0; k < depth * kTileSize; k += kTileSize) {
                _tile_loadd(4, left + k, 64);
                _tile_loadd(6, b + k, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + b_stride + k, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, left + a_stride + k, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, at, row);
            _tile_stored(1, at + kTileSide, row);
            _tile_stored(2, below, row);
            _tile_stored(3, below + kTileSide, row);
        }
    }
}

inline int64_t tiles(int64_t n, int side) { return (n + side - 1) / side; }
// Tiles of n rows or columns, an even number.
inline int64_t pairs_of_tiles(int64_t n) { return 2 * tiles(n, 2 * kTileSide); }

inline __mmask32 first_words(int n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

// 32 elements as bf16, 0 from the nth on: the storage types of a cache all fit.
inline __m512i load_words(const BFloat16* p, int n) { return _mm512_maskz_loadu_epi16(first_words(n), p); }
template <class T>
inline __m512i load_words(const T* p, int n) {
    const F low = n > 0 ? load_some(p, n) : zero();
    const F high = n > kLanes ? load_some(p + kLanes, n - kLanes) : zero();
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Key j's pair of elements d, d + 1 is column j of a tile's row d / 2.
template <class T, int kKeys>
void pack_key_tiles(const KeyBlock<kKeys>& keys, int64_t width, BFloat16* tiles) {
    for (int j = 0; j < round_up(keys.num_keys, 2 * kTileSide); j += kTileSide) {
        for (int64_t d = 0; d < width; d += kTileDepth, tiles += kTileSize) {
            F x[kTileSide];
            for (int i = 0; i < kTileSide; ++i) {
                const T* key = reinterpret_cast<const T*>(keys.k[j + i]) + d;
                x[i] = _mm512_castsi512_ps(load_words(key, clip(width - d, 0, kTileDepth)));
            }
            transpose(x);
            for (int i = 0; i < kTileSide; ++i) _mm512_store_ps(tiles + i * kTileDepth, x[i]);
        }
    }
}

// Values of keys j, j + 1 are pairs of a tile's row j / 2; zeros past the last key.
template <class T, int kKeys>
void pack_value_tiles(const KeyBlock<kKeys>& keys, int64_t width, BFloat16* tiles) {
    alignas(64) uint16_t order[2][32];  // word i of b: 32 + i
    for (int i = 0; i < 32; ++i) {
        order[0][i] = uint16_t(i / 2 + i % 2 * 32);
        order[1][i] = uint16_t(order[0][i] + 16);
    }
    const __m512i low = _mm512_load_si512(order[0]);
    const __m512i high = _mm512_load_si512(order[1]);
    constexpr int64_t kColumn = kKeys / kTileDepth * kTileSize;
    for (int64_t d = 0; d < width; d += 2 * kTileSide, tiles += 2 * kColumn) {
        const int n = clip(width - d, 0, 2 * kTileSide);
        const auto words = [&](int key) {
            if (key >= keys.num_keys) return _mm512_setzero_si512();
            return load_words(reinterpret_cast<const T*>(keys.v[key]) + d, n);
        };
        for (int j = 0; j < round_up(keys.num_keys, kTileDepth); j += 2) {
            const __m512i a = words(j);
            const __m512i b = words(j + 1);
            BFloat16* row = tiles + j * kTileSide;
            _mm512_store_si512(row, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(row + kColumn, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// The two products of a tile in bf16; see FmaTile.
template <class T>
struct AmxTile {
    using Value = T;
    static constexpr int kKeys = kTileKeys;
    static constexpr int kKeyStep = kTileDepth;
    static constexpr int64_t kRowBlock = 2 * kTileSide;

    const TileScratch& s;
    int64_t D, Dv;
    Tiles registers = {};

    BFloat16* q(int64_t row) const {  // row: a multiple of kTileSide
        return reinterpret_cast<BFloat16*>(s.q) + row * round_up(D, kTileDepth);
    }
    BFloat16* keys() const { return reinterpret_cast<BFloat16*>(s.keys); }
    BFloat16* values() const { return reinterpret_cast<BFloat16*>(s.values); }
    BFloat16* weights(int64_t row) const {  // row: as of q
        return reinterpret_cast<BFloat16*>(s.weights) + row * kKeys;
    }

    void take_query(int64_t r, DType, const char* row) const {
        BFloat16* to = q(r / kTileSide * kTileSide) + r % kTileSide * kTileDepth;
        for (int64_t d = 0; d < D; d += kTileDepth, to += kTileSize) {
            const auto* from = reinterpret_cast<const BFloat16*>(row) + d;
            _mm512_store_si512(to, load_words(from, clip(D - d, 0, kTileDepth)));
        }
    }
    void pack(const KeyBlock<kKeys>& block) const {
        pack_key_tiles<T>(block, D, keys());
        pack_value_tiles<T>(block, Dv, values());
    }
    void logits(int64_t row, int64_t rows, int num_keys) const {
        const int64_t depth = tiles(D, kTileDepth);
        const int64_t stride = depth * kTileSize;
        tile_gemm(q(row), stride, pairs_of_tiles(rows), keys(), stride, pairs_of_tiles(num_keys), depth, false,
                  s.logits, kKeys);
    }
    // Rounded to bf16; the sum that divides them is of the unrounded ones.
    auto put_weights(int64_t r) const {
        BFloat16* row = weights(r / kTileSide * kTileSide) + r % kTileSide * kTileDepth;
        return [row](int key, F x) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(row + key / kTileDepth * kTileSize + key % kTileDepth),
                               (__m256i)_mm512_cvtneps_pbh(x));
        };
    }
    void add_values(int64_t row, int64_t rows, int num_keys) const {
        float* acc = s.acc + row * s.ld_acc;
        for (int64_t r = 0; r < rows; ++r) {
            if (s.rescale[row + r] == 1.0f) continue;
            const F factor = set1(s.rescale[row + r]);
            for (int64_t d = 0; d < Dv; d += kLanes) {
                float* at = acc + r * s.ld_acc + d;
                store(at, mul(load(at), factor));
            }
        }
        constexpr int64_t kStride = kKeys / kTileDepth * kTileSize;
        tile_gemm(weights(0), kStride, pairs_of_tiles(rows), values(), kStride, pairs_of_tiles(Dv),
                  tiles(num_keys, kTileDepth), true, acc, s.ld_acc);
    }
};

// In bf16 where that loses nothing of the queries and the cache.
void attend_tile_bf16(const AttentionParams& p, const Piece& piece, char* scratch) {
    if (p.q.dtype != DType::kBFloat16) return attend_tile(p, piece, scratch);
    if (p.k.dtype == DType::kBFloat16) return attend_tile<AmxTile<BFloat16>>(p, piece, scratch);
    with_dtype(p.k.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 1) attend_tile<AmxTile<T>>(p, piece, scratch);
    });
}
