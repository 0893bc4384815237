// What follows from the cache's element type, the padded width and the number of rows: a block's shape, and its shared
// memory.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/attention/decode_kernels.h"
#include "cuda/attention/operand.h"
#include "cuda/attention/plan.h"
#include "cuda/attention/requests.h"
#include "cuda/device/thread.h"

namespace pagewire {

// kWide: for 17 to 64 packed rows. Two or four warps take 16 rows each and the same keys, in copies that all warps share;
// 8 warps, so that a scheduler has two. Else every warp has keys and copies of its own, and all of the 16 rows.
template <class T_, int kWidth_, bool kWide_>
struct Shape {
    using T = T_;
    using Operand = typename OperandOf<T>::type;
    static constexpr int kWidth = kWidth_;
    static constexpr bool kWide = kWide_;
    static constexpr bool kQuantised = sizeof(T) == 1;
    static constexpr int kWarps = kWide ? 8 : kWidth == 256 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kMinBlocks = kWide ? 1 : kWidth == 64 ? 3 : 2;
    static constexpr int kMaxRows = kWide ? 64 : 16;

    static constexpr int kStepKeys = 32 / static_cast<int>(sizeof(T));  // a warp multiplies at a time: 32 or 16
    static constexpr int kSteps = !kWide ? kWarps : kWidth == 256 ? 2 : 4;
    static constexpr int kTile = kSteps * kStepKeys;
    static constexpr int kLeastRowWarps = kWarps / kSteps;      // else some would have no step
    static constexpr int kCopyKeys = kTile / kWarps;            // a warp copies of a tile
    static constexpr int kGroupKeys = std::min(kCopyKeys, 16);  // neighbours that may lie in one page

    static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(T));
    static constexpr int kRowChunks = kRowBytes / 16;
    static constexpr int kTileBytes = kTile * kRowBytes;  // of K or V
    static constexpr int kQRowBytes = kWidth * 2;
    static constexpr int kColumns = kWidth / 8;   // column tiles of out
    static constexpr int kTiles = kStepKeys / 8;  // key tiles of a step's logits
    // the state leaves so few that one load's matrices are multiplied at a time; a branch between keeps them apart
    static constexpr bool kFewRegisters = kQuantised && kWidth == 256;
    static constexpr bool kQInRegisters = kWidth <= 128;
    static constexpr int kExchangeRows = 16 * kWarps;
    static constexpr int kExchangeColumns = std::min(kWidth, 128);
};

// The warps' states, some columns at a time.
template <class S>
struct Exchange {
    float base[S::kExchangeRows], sum[S::kExchangeRows];
    float out[S::kExchangeRows][S::kExchangeColumns + 8];
};

template <class S>
struct Shared {
    struct Stage {
        char k[S::kTileBytes], v[S::kTileBytes];  // [kTile][kRowBytes], swizzled
    };
    Walk walk;
    Piece piece;
    int is_last;
    uint32_t keys_there[kMaxStages][S::kWarps];  // a bit for each key of a warp's copies
    float q_unit[S::kMaxRows];                   // what 1 in a row's q stands for
    float token_scale[kMaxStages][2][S::kTile];  // of K, of V
    union {
        struct {
            alignas(128) char q[S::kMaxRows * S::kQRowBytes];
            Stage stage[kMaxStages];
        } tiles;
        Exchange<S> exchange;  // when all tiles have been read
    };

    static constexpr size_t bytes(int num_stages) {
        return sizeof(Shared) - static_cast<size_t>(kMaxStages - num_stages) * sizeof(Stage);
    }
    static_assert(sizeof(Exchange<S>) <= S::kMaxRows * S::kQRowBytes + 2 * sizeof(Stage), "two stages hold it");
};

template <class S>
PW_DEVICE Shared<S>& shared_of_block() {
    return *reinterpret_cast<Shared<S>*>(shared_memory());
}

// Where 16-byte chunk `chunk` of row `row` lies: eight rows of one chunk fall into eight different banks. swizzle_bits is
// linear in the bits of the row: what a step of rows changes is one exclusive or.
template <int kRowBytes>
PW_HOST_DEVICE constexpr int swizzle_bits(int row) {
    constexpr int kChunks = kRowBytes / 16;
    return (kChunks >= 8 ? row & 7 : row / (8 / std::min(kChunks, 8)) & (kChunks - 1)) << 4;
}
template <int kRowBytes>
PW_DEVICE int swizzle(int row, int chunk) {
    return row * kRowBytes + (chunk << 4 ^ swizzle_bits<kRowBytes>(row));
}

// From a chunk's place to that of the chunk `step` behind it in its row, where chunk and step have no bit in common. What
// lies below the swizzled bits' period is one exclusive or, the rest one addition.
template <int kRowBytes>
PW_DEVICE int step_chunks(int place, int step) {
    constexpr int kPeriod = std::min(kRowBytes / 16, 8);
    return (place ^ (step % kPeriod << 4)) + (step / kPeriod * kPeriod << 4);
}

// Packed rows of a piece, from its row tile's first on.
PW_DEVICE int rows_of(const Schedule& s, const Piece& piece) {
    return std::min(piece.q_len * s.group_size - piece.row_tile * s.row_tile_len, s.row_tile_len);
}

}  // namespace pagewire
