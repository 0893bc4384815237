// append_kv, pack_kv and unpack_kv are one movement: rows of heads, between rows and slots,
// converted on the way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/error_kind.h"
#include "pagewire/dtype.h"

namespace pagewire {

enum class ScaleUse : int {
    kNone,   // stored values are real values
    kValue,  // one number, known on the host
    kRead,   // at the pointer
    kMake,   // target only: amax of the row / largest stored value, written at the pointer
    kCopy,   // both sides: travels with the bytes; with no stride over tokens: once per layer and head
};

// Where a row of one head lies: pointer + page * stride_page + offset * stride_token + head *
// stride_head, in bytes. Of the side without slots, page is 0 and offset counts tokens.
struct MoveSide {
    DType dtype;
    int64_t stride_page, stride_token, stride_head;
    ScaleUse scale;
    float scale_value;
    int64_t scale_stride_page, scale_stride_token, scale_stride_head;  // in bytes
};

struct MovePointers {  // of one layer's K or V
    const char* source;
    char* target;
    const char* source_scale;
    char* target_scale;
};

// K or V, of all layers.
struct MovePart {
    int width;  // elements of a row
    MoveSide source, target;
};

struct MoveRequest {
    std::vector<MovePart> parts;         // K and V; one when V is a view of K
    std::vector<MovePointers> pointers;  // [num_layers][parts]
    bool source_has_slots;
    const void* slots;  // [num_tokens] int32 or int64
    bool slots_int64;
    int64_t slot_stride, num_slots, page_size, num_tokens, num_heads;
    ErrorKind error_kind;
    int64_t* error_word;
    int device;
    uintptr_t stream;
};

void move(const MoveRequest& request);

}  // namespace pagewire
