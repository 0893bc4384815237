// What the parts of the attention kernel share: the shape of a block, its shared memory, its way
// out. Each further header adds one part to the one below it: requests, loads, step, merge, kernel.
#pragma once

#include "cuda/attention_work.h"
#include "cuda/convert.h"

namespace pagewire {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Everything that follows from the element types, the padded width and the room a device has:
// kSmall_ is for those with 99 KiB of shared memory a block (sm_86, sm_89, sm_120).
template <class Q, class KV, int kWidth_, bool kSmall_>
struct Shape {
    static constexpr int kWidth = kWidth_;
    static constexpr bool kSmall = kSmall_;
    static constexpr bool kQuantised = sizeof(KV) == 1;
    static constexpr int kWarps = kWidth == 256 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kMinBlocks = kWidth == 64 ? 3 : 2;
    static constexpr int kStages = kWidth == 64 ? 4 : kSmall ? 2 : 3;
    static constexpr int kKeys = 32 / static_cast<int>(sizeof(KV));  // a warp's, of a tile: 32 or 16
    static constexpr int kTile = kKeys * kWarps;
    static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(KV));
    static constexpr int kRowChunks = kRowBytes / 16;
    static constexpr int kTileBytes = kTile * kRowBytes;  // of K or V
    static constexpr int kStageBytes = 2 * kTileBytes;
    static constexpr int kQRowBytes = kWidth * static_cast<int>(sizeof(Q));
    static constexpr int kColumns = kWidth / 8;  // column tiles of out
    static constexpr bool kQInRegisters = kWidth <= 128;
    static constexpr int kOutStride = kWidth + 8;                         // floats, of the rows the warps exchange
    static constexpr int kBitsOffset = 0;                                 // uint32 [kStages][kWarps]
    static constexpr int kScratchOffset = kBitsOffset + 128;              // scans, broadcasts, Parts
    static constexpr int kRequestsOffset = kScratchOffset + 128;          // int [kThreads][4]
    static constexpr int kScaleOffset = kRequestsOffset + kThreads * 16;  // float [kStages][2][kTile]
    static constexpr int kStageOffset = (kScaleOffset + kStages * 2 * kTile * 4 + 127) / 128 * 128;
    static constexpr int kQOffset = kStageOffset + kStages * kStageBytes;

    static size_t shared_bytes(int warps_m) { return static_cast<size_t>(kQOffset + 16 * warps_m * kQRowBytes); }
};

// Where 16-byte chunk `chunk` of row `row` lies: eight rows of one chunk fall into eight different banks.
template <int kRowBytes>
PW_DEVICE int swizzle(int row, int chunk) {
    constexpr int kChunks = kRowBytes / 16;
    if constexpr (kChunks >= 8) {
        return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    } else {
        return row * kRowBytes + ((chunk ^ (row / (8 / kChunks) & (kChunks - 1))) << 4);
    }
}

template <class S, class Q, class KV>
struct AttentionBase {
    const AttentionPlan& p;
    char* shared;
    int lane, warp;
    uint64_t policy;

    PW_DEVICE explicit AttentionBase(const AttentionPlan& plan)
        : p(plan),
          shared(shared_memory()),
          lane(thread_index() % 32),
          warp(thread_index() / 32),
          // rows of other chunks read the same K and V again
          policy(plan.max_chunks == 1 ? evict_first_policy() : evict_normal_policy()) {}

    PW_DEVICE uint32_t* key_bits(int stage, int warp_idx) const {
        return reinterpret_cast<uint32_t*>(shared + S::kBitsOffset) + stage * S::kWarps + warp_idx;
    }
    PW_DEVICE int64_t* scratch64() const { return reinterpret_cast<int64_t*>(shared + S::kScratchOffset); }
    PW_DEVICE int* scratch() const { return reinterpret_cast<int*>(shared + S::kScratchOffset + 64); }
    PW_DEVICE int* request_info(int i) const { return reinterpret_cast<int*>(shared + S::kRequestsOffset) + 4 * i; }
    PW_DEVICE int64_t* parts() const { return reinterpret_cast<int64_t*>(shared + S::kScratchOffset + 80); }
    // Per-token scales of K (0) or V (1).
    PW_DEVICE float* key_scale(int stage, int which, int key) const {
        return reinterpret_cast<float*>(shared + S::kScaleOffset) + (stage * 2 + which) * S::kTile + key;
    }
    PW_DEVICE char* tile(int stage, int which) const {
        return shared + S::kStageOffset + stage * S::kStageBytes + which * S::kTileBytes;
    }
    PW_DEVICE char* q_rows() const { return shared + S::kQOffset; }

    // Warps that read each other's keys wait for each other.
    PW_DEVICE void sync_sharers() const {
        if (p.warps_m == 1) {
            sync_warp();
        } else {
            sync_block();
        }
    }

    PW_DEVICE int valid_rows(const RequestWork& w, const Segment& s) const {
        const int left = w.q_len * p.group_size - s.chunk * p.chunk_rows;
        return left < p.chunk_rows ? left : p.chunk_rows;
    }

    PW_DEVICE void store_lse(int row, int head, float lse) const {
        store_global(p.lse + row * p.lse_stride_row + head * p.lse_stride_head, lse);
    }
    PW_DEVICE void store_out(int row, int head, int column, float x) const {
        const int64_t at = row * p.out_stride_row + head * p.out_stride_head + column;
        if (p.out_float32) {
            store_global(reinterpret_cast<float*>(p.out) + at, x);
        } else {
            Q y;
            from_float(x, y);
            store_global(reinterpret_cast<Q*>(p.out) + at, y);
        }
    }
};

}  // namespace pagewire
