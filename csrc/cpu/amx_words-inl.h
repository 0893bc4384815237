// Stored elements as bf16 words, the operands of AMX. Included inside the anonymous namespace of target_amx.cpp.

constexpr int kChunk = 64;  // elements of a row that are unpacked together: four columns of tiles

struct Chunk {  // as bf16 words
    __m512i x, y;
};
inline void put(Chunk chunk, BFloat16* x, BFloat16* y) {
    _mm512_store_si512(x, chunk.x);
    _mm512_store_si512(y, chunk.y);
}

inline __mmask64 first_bytes(int n) { return n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1; }

// Chunks of a row of elements: word w of vector u holds element source(u, w); runs of four stay together.
template <class T>
struct Words {  // one-byte types, by table: byte b is {low, high}[b]
    __m512i low[2], high[2], negative_low[2], negative_high[2];
    static constexpr bool kAsStored = false;
    static constexpr int source(int u, int w) { return w / 8 * 16 + u * 8 + w % 8; }

    Words() {
        alignas(64) uint8_t bytes[2][256];
        for (int i = 0; i < 256; i += kLanes) {
            alignas(16) uint8_t codes[kLanes];
            for (int j = 0; j < kLanes; ++j) codes[j] = uint8_t(i + j);
            alignas(64) uint32_t bits[kLanes];
            _mm512_store_ps(bits, ::pagewire::cpu::load(reinterpret_cast<const T*>(codes)));
            for (int j = 0; j < kLanes; ++j) {
                bytes[0][i + j] = uint8_t(bits[j] >> 16);
                bytes[1][i + j] = uint8_t(bits[j] >> 24);
            }
        }
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_load_si512(bytes[0] + 64 * i);
            high[i] = _mm512_load_si512(bytes[1] + 64 * i);
            negative_low[i] = _mm512_load_si512(bytes[0] + 128 + 64 * i);
            negative_high[i] = _mm512_load_si512(bytes[1] + 128 + 64 * i);
        }
    }
    template <bool kWhole>
    Chunk load(const T* row, int n) const {
        const __m512i x = kWhole ? _mm512_loadu_si512(row) : _mm512_maskz_loadu_epi8(first_bytes(n), row);
        __m512i l = _mm512_permutex2var_epi8(low[0], x, low[1]);
        __m512i h = _mm512_permutex2var_epi8(high[0], x, high[1]);
        if constexpr (std::is_same_v<T, int8_t>) {
            const __mmask64 negative = _mm512_movepi8_mask(x);
            l = _mm512_mask_mov_epi8(l, negative, _mm512_permutex2var_epi8(negative_low[0], x, negative_low[1]));
            h = _mm512_mask_mov_epi8(h, negative, _mm512_permutex2var_epi8(negative_high[0], x, negative_high[1]));
        } else {  // the sign is a bit of its own
            h = _mm512_ternarylogic_epi32(h, x, _mm512_set1_epi8(char(0x80)), 0xf8);
        }
        return {_mm512_unpacklo_epi8(l, h), _mm512_unpackhi_epi8(l, h)};
    }
};

template <>
struct Words<BFloat16> {
    static constexpr bool kAsStored = true;
    static constexpr int source(int u, int w) { return 32 * u + w; }
    template <bool kWhole>
    Chunk load(const BFloat16* row, int n) const {
        if (kWhole) return {_mm512_loadu_si512(row), _mm512_loadu_si512(row + 32)};
        return {load_words(row, n), load_words(row + 32, n - 32)};
    }
};
