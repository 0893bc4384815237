// The shape of a block of decode_sm90, and its shared memory: one warp loads, four multiply, with K and V as the tensor
// core's operand of 16 rows and the queries as that of 8 columns.
#pragma once

#include "cuda/attention/shape.h"
#include "cuda/device/tma.h"

namespace pagewire {

// Rows are whole panels, and registers hold the state.
template <class T, int kWidth, int kRows>
constexpr bool kFitsSm90 = kWidth * sizeof(T) % 128 == 0 && !(sizeof(T) == 1 && kWidth == 256 && kRows == 16);

// kRows: 8 or 16 packed rows. Rows of the cache are whole panels of 128 bytes.
template <class T_, int kWidth_, int kRows_>
struct ShapeSm90 {
    using T = T_;
    using Operand = typename OperandOf<T>::type;
    static constexpr int kWidth = kWidth_;
    static constexpr int kRows = kRows_;
    static constexpr bool kQuantised = sizeof(T) == 1;
    static constexpr int kWarps = 4;  // that multiply
    static constexpr int kThreads = 32 * (kWarps + 1);
    static constexpr int kMinBlocks = kWidth == 64 ? 3 : kWidth == 128 && !(kQuantised && kRows == 16) ? 2 : 1;

    static constexpr int kStepKeys = 32 / static_cast<int>(sizeof(T));  // of a warp and a tile: 32 or 16
    static constexpr int kTile = kWarps * kStepKeys;
    static constexpr int kLeastBox = 8;  // tokens: the swizzle's period
    static constexpr int kRowTiles = kRows / 8, kKeyTiles = kStepKeys / 16, kColumnTiles = kWidth / 16;

    static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(T));
    static constexpr int kPanels = kRowBytes / 128;
    static constexpr int kPanelElements = kWidth / kPanels;
    static constexpr int kTileBytes = kTile * kRowBytes;  // of K or V
    static constexpr int kQRowBytes = kWidth * 2;
    static constexpr bool kQInRegisters = kRows * kWidth <= (kQuantised ? 8 : 16) * 128;
    static constexpr int kExchangeRows = kRows * kWarps;
    static constexpr int kExchangeColumns = std::min(kWidth, 128);
};

template <class S>
struct SharedSm90 {
    struct Stage {
        char k[S::kTileBytes], v[S::kTileBytes];  // [kPanels][kTile][128], swizzled by the TMA
    };
    Walk walk;
    Piece piece;
    int is_last;
    uint32_t boxes_there[kMaxStages];  // a bit for each box of a tile whose page can be read
    Mbarrier full[kMaxStages], empty[kMaxStages];
    Mbarrier queries;  // of a piece are there, for the warps that multiply
    float q_unit[S::kRows];
    alignas(128) char q[S::kRows * S::kQRowBytes];
    union alignas(1024) {
        Stage stage[kMaxStages];
        Exchange<S> exchange;  // when all tiles have been read
    };

    static constexpr size_t bytes(int num_stages) {
        return sizeof(SharedSm90) - static_cast<size_t>(kMaxStages - num_stages) * sizeof(Stage);
    }
    static_assert(sizeof(Exchange<S>) <= 2 * sizeof(Stage), "two stages hold it");
};

// Where a pipeline is: the stage, and the parity of its phase.
struct Turn {
    int stage = 0, parity = 0;

    PW_DEVICE void next(int num_stages) {
        if (++stage == num_stages) stage = 0, parity ^= 1;
    }
};

// Byte offset in a tile of K or V of 16-byte chunk `chunk` of the row of `key`.
template <class S>
PW_DEVICE int place_in_panels(int key, int chunk) {
    return chunk / 8 * S::kTile * 128 + key * 128 + swizzled_byte(key, chunk % 8);
}

}  // namespace pagewire
