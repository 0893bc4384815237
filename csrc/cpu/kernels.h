// What one ISA provides. A target_*.cpp fills one table; isa.cpp picks one at run time. No STL:
// target files include it.
#pragma once

#include <cstdint>

#include "pagewire/params.h"

namespace pagewire::cpu {

constexpr int kMaxKeyBlock = 64;   // keys a few-rows kernel takes at a time, at most
constexpr int kFewRows = 16;       // rows (tokens x group_size) of a request up to which the few-rows kernel takes it
constexpr int kTileRows = 192;     // rows of a tile, unless one token has more: of a short request
constexpr int kMaxTileRows = 768;  // and of a long one
constexpr int kTileKeys = 256;     // keys a tile takes at a time, at most
constexpr int kMaxWidth = 1024;    // of a head
constexpr int kAlign = 64;         // floats; scratch rows are padded to it

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Keys [begin, end) that a query row sees.
struct KeyRange {
    int64_t begin, end;
};

inline KeyRange visible_keys(const AttentionParams& p, int64_t seq_len, int64_t position) {
    KeyRange r{0, seq_len};
    if (p.window_left >= 0 && position - p.window_left > 0) r.begin = position - p.window_left;
    if (p.window_right >= 0 && position + p.window_right + 1 < r.end) r.end = position + p.window_right + 1;
    if (p.causal && position + 1 < r.end) r.end = position + 1;
    if (r.end < r.begin) r.end = r.begin;
    return r;
}

// Keys that rows [position, position + num_rows) all see: a row's range begins and ends no sooner
// than that of the row before.
inline KeyRange keys_all_see(const AttentionParams& p, int64_t seq_len, int64_t position, int64_t num_rows) {
    return {visible_keys(p, seq_len, position + num_rows - 1).begin, visible_keys(p, seq_len, position).end};
}

// A piece of attention that one thread computes: some rows of one request, some kv heads, some keys.
struct Piece {
    int64_t request, seq_len;
    int64_t row_begin, row_end;    // of q and out
    int64_t position;              // of row_begin
    int64_t head_begin, head_end;  // kv heads
    int64_t key_begin, key_end;
    int64_t split, part;  // of a request whose keys are shared out: which request, which part; split -1: the whole
    float* partial_out;   // [row_end - row_begin, num_qo_heads, head_dim_v]; null: this is the whole result
    float* partial_lse;   // [row_end - row_begin, num_qo_heads]
};

// Hands out 64-byte aligned arrays of one allocation; with a null base it only measures.
struct Carver {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        char* at = base == nullptr ? nullptr : base + used;
        used += round_up(count * int64_t(sizeof(T)), 64);
        return reinterpret_cast<T*>(at);
    }
};

// Rows of the few-rows kernel: R = tokens x group_size rows of each of H kv heads.
struct FewRowsScratch {
    float *q, *acc;            // [H, R, padded width]
    float *top, *total;        // [H, R] running maximum (base 2) and sum
    float* logits;             // [R, kMaxKeyBlock]
    char* tiles;               // what a target packs: see tile_bytes()
    float *rescale, *unit;     // [R padded]
    float* row;                // [padded width]
    float *k_scale, *v_scale;  // [kMaxKeyBlock]
    int64_t ld_q, ld_acc;

    // In bf16: 16 rows of q a head, 16 keys, four tiles of values and one of weights.
    static int64_t tile_bytes(int64_t H, int64_t head_dim) {
        return 2 * (16 * round_up(head_dim, kAlign) * (H + 1) + 5 * 512);
    }

    void carve(Carver& carver, int64_t H, int64_t R, int64_t head_dim, int64_t head_dim_v) {
        ld_q = round_up(head_dim, kAlign);
        ld_acc = round_up(head_dim_v, kAlign);
        q = carver.take<float>(H * R * ld_q);
        acc = carver.take<float>(H * R * ld_acc);
        top = carver.take<float>(H * round_up(R, kAlign));
        total = carver.take<float>(H * round_up(R, kAlign));
        logits = carver.take<float>(R * kMaxKeyBlock);
        tiles = carver.take<char>(tile_bytes(H, head_dim));
        rescale = carver.take<float>(round_up(R, kAlign));
        unit = carver.take<float>(round_up(R, kAlign));
        row = carver.take<float>(ld_q + ld_acc);
        k_scale = carver.take<float>(kMaxKeyBlock);
        v_scale = carver.take<float>(kMaxKeyBlock);
    }
};

// A tile: R rows (token x head of the group) of one kv head against blocks of up to kTileKeys keys;
// up to kTileRows of the rows at a time have logits and weights.
struct TileScratch {
    float *q, *acc;                       // [R, head_dim], [R, ld_acc]
    float* keys;                          // K transposed, in panels of columns: [panel][head_dim][panel width]
    float* values;                        // V in panels of columns: [panel][kTileKeys][panel width]
    float* logits;                        // [kTileRows, kTileKeys]
    float* weights;                       // [kTileRows, kTileKeys / 2]: room for them in bf16
    float *top, *total, *rescale, *unit;  // [R padded]
    float *k_scale, *v_scale;             // [kTileKeys]
    int64_t ld_acc;

    // Rows and widths have room for whole tiles of 32 x 32.
    void carve(Carver& carver, int64_t num_rows, int64_t head_dim, int64_t head_dim_v) {
        const int64_t R = round_up(num_rows, 32);
        ld_acc = round_up(head_dim_v, kAlign);
        q = carver.take<float>(R * round_up(head_dim, 32));
        acc = carver.take<float>(R * ld_acc);
        keys = carver.take<float>(kTileKeys * round_up(head_dim, kAlign));
        values = carver.take<float>(kTileKeys * ld_acc);
        logits = carver.take<float>(kTileRows * kTileKeys);
        weights = carver.take<float>(kTileRows * kTileKeys / 2);
        top = carver.take<float>(round_up(R, kAlign));
        total = carver.take<float>(round_up(R, kAlign));
        rescale = carver.take<float>(round_up(R, kAlign));
        unit = carver.take<float>(round_up(R, kAlign));
        k_scale = carver.take<float>(kTileKeys);
        v_scale = carver.take<float>(kTileKeys);
    }
};

struct Kernels {
    const char* name;
    void (*attend_few_rows)(const AttentionParams&, const Piece&, char* scratch);
    void (*attend_tile)(const AttentionParams&, const Piece&, char* scratch);
    void (*merge_states)(const MergeParams&, int64_t row_begin, int64_t row_end,
                         float* weights);  // weights [n]
    // `stream`: so many bytes that no cache would keep them: past the caches
    void (*move_rows)(const MoveParams&, const Move&, int64_t token_begin, int64_t token_end, bool stream);
    float (*read)(const float* data, int64_t count);  // nothing but loads: the roof of decode
};

// AMX needs the operating system's permission, which is asked for on Linux, and a compiler that has its intrinsics.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 11
#define PAGEWIRE_AMX 1
#endif

extern const Kernels kAmx, kAvx512, kAvx2, kNeon, kScalar;

}  // namespace pagewire::cpu
