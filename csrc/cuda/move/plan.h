// What a launch of copy_kernel or convert_kernel is told. Layer pointers travel as kernel arguments: nothing is
// uploaded or remembered.
#pragma once

#include "cuda/divisor.h"
#include "cuda/error_kind.h"
#include "pagewire/params.h"

namespace pagewire::moving {

constexpr int kThreads = 128;
constexpr int kManyLayers = 240;  // pointers that fit in the 32 KiB of kernel arguments that sm_70+ takes
constexpr int kUsualLayers = 48;  // and in the 4 KiB that every driver takes

// Row r is head r % num_heads of token r / num_heads, or, where a head's tokens lie closer together than a token's
// heads, token r % num_tokens of head r / num_tokens.
struct Rows {
    uint32_t num_rows;  // < 2^31
    bool head_fastest;
    Divisor<uint32_t> fastest;  // num_heads or num_tokens
    IndexView slots;            // [num_tokens]
    int64_t num_slots;
    Divisor<uint64_t> page_size;
    Divisor<uint32_t> page_size32;  // of slots below 2^31
    bool slots_on_source;           // else on the target
    bool skip_negative;
    ErrorKind error_kind;
    int64_t* error_word;
};

// Of one layer's K or V.
struct Plane {
    const char* source;
    char* target;
    const float* source_scale;
    float* target_scale;
};

template <int kLayers>
struct Plan {
    Rows rows;
    Move part[2];  // K and V: of all layers but for the pointers, which are each plane's; sides' strides are in bytes
    int num_parts, num_layers;
    bool parts_alike;          // but for the pointers
    int planes_per_block;      // a block takes planes block_y * planes_per_block onwards, all layers of K first
    uint32_t num_heads;        // that shared scales are for
    int align;                 // bytes that every row and stride of both sides is a multiple of: 1, 2, 4, 8 or 16
    int log2_lanes;            // converting: lanes that share a row
    uint32_t rows_of_block;    // copying: rows that a block takes, and how a row is shared out among blocks and threads
    Divisor<uint32_t> units;   //   units of `align` bytes of a row's piece, at most what a block has in flight
    Divisor<uint32_t> pieces;  //   pieces of a row, each of another block
    Plane plane[kLayers][2];
};

}  // namespace pagewire::moving
