// append_kv, pack_kv, unpack_kv.
//
// grid: [ceil(num_tokens * num_heads / rows a block takes), num_layers * parts]. A few lanes move
// one row of one head; each lane has kRows rows in flight. Layer pointers travel as kernel
// arguments: nothing is uploaded or remembered.
//
// Plan: 128 threads, no shared memory. Copying: 7 blocks a multiprocessor (72 registers), kRows *
// 16 bytes in flight a thread, 56 KiB a multiprocessor. Converting: 8 blocks (64 registers), 16
// elements a thread, 32 KiB of bf16.
#include "cuda/move/move.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/convert.h"
#include "cuda/device/memory.h"
#include "cuda/error_word.h"
#include "cuda/launch.h"

namespace pagewire {

namespace {

constexpr int kThreads = 128;
constexpr int kRows = 4;          // rows in flight a lane
constexpr int kElements = 16;     // converted at a time by a lane
constexpr int kManyLayers = 240;  // pointers that fit in the 32 KiB of kernel arguments sm_70+ takes
constexpr int kUsualLayers = 48;  // and in the 4 KiB every driver takes

// A MoveSide without its addresses, in bytes.
struct ByteSide {
    DType dtype;
    int64_t stride_page, stride_token, stride_head;
    ScaleKind scale_kind;
    float scale_value;
    int64_t scale_stride_page, scale_stride_token, scale_stride_head;

    bool operator==(const ByteSide&) const = default;
};

struct MovePart {  // K or V, of all layers
    int width;     // elements of a row
    MoveHow how;
    ByteSide source, target;

    bool operator==(const MovePart&) const = default;
};

struct MovePointers {  // of one layer's K or V
    const char* source;
    char* target;
    const char* source_scale;
    char* target_scale;
};

struct Slots {
    IndexView index;
    int64_t num_slots, page_size;
    bool on_source, skip_negative;
    ErrorKind error_kind;
    int64_t* error_word;
};

template <int kLayers>
struct MovePlan {
    MovePart part[2];
    MovePointers pointers[kLayers][2];
    Slots slots;
    int num_parts;
    uint32_t num_rows, num_tokens, num_heads;
    bool head_fastest;  // consecutive rows are heads of a token, else tokens of a head
    int align;          // bytes every row and stride of both sides is a multiple of: 1, 2, 4, 8 or 16
    int log2_lanes;     // lanes that share a row
};

enum class Fate : int { kMove, kZero, kSkip };

struct Row {
    Fate fate;
    uint32_t token, head;
    int64_t page, offset;  // of the slot
};

template <int kLayers>
PW_DEVICE Row locate(const MovePlan<kLayers>& p, uint32_t row, bool reports) {
    Row r{Fate::kSkip, 0, 0, 0, 0};
    if (row >= p.num_rows) return r;
    r.token = p.head_fastest ? row / p.num_heads : row % p.num_tokens;
    r.head = p.head_fastest ? row % p.num_heads : row / p.num_tokens;
    const Slots& s = p.slots;
    const int64_t at = r.token * s.index.stride;
    const int64_t slot = s.index.is_int64 ? load_global(static_cast<const int64_t*>(s.index.data) + at)
                                          : load_global(static_cast<const int32_t*>(s.index.data) + at);
    if (slot < 0 || slot >= s.num_slots) {
        if (!(slot < 0 && s.skip_negative) && reports && r.head == 0) {
            record_error(s.error_word, s.error_kind, 0, r.token);
        }
        r.fate = s.on_source ? Fate::kZero : Fate::kSkip;
        return r;
    }
    r.fate = Fate::kMove;
    if (slot < (int64_t(1) << 31)) {  // 64-bit division costs some seventy instructions
        r.page = static_cast<uint32_t>(slot) / static_cast<uint32_t>(s.page_size);
        r.offset = static_cast<uint32_t>(slot) % static_cast<uint32_t>(s.page_size);
    } else {
        r.page = slot / s.page_size;
        r.offset = slot % s.page_size;
    }
    return r;
}

// Byte offset of a row on a side.
PW_DEVICE int64_t offset_of(const ByteSide& side, const Row& r, bool by_slot) {
    return (by_slot ? r.page * side.stride_page + r.offset * side.stride_token : r.token * side.stride_token) +
           r.head * side.stride_head;
}
PW_DEVICE int64_t scale_offset_of(const ByteSide& side, const Row& r, bool by_slot) {
    return (by_slot ? r.page * side.scale_stride_page + r.offset * side.scale_stride_token
                    : r.token * side.scale_stride_token) +
           r.head * side.scale_stride_head;
}

// ----------------------------------------------------------------------------------- byte copy

template <class Chunk>
PW_DEVICE Chunk zero_chunk() {
    return Chunk{};
}

PW_DEVICE Vec16 read_chunk(const Vec16* p) { return load_streaming(p); }
template <class Chunk>
PW_DEVICE Chunk read_chunk(const Chunk* p) {
    return load_global(p);
}

template <class Chunk, int kLayers>
PW_DEVICE void copy_rows(const MovePlan<kLayers>& p, const MovePart& part, const MovePointers& pointers) {
    const bool by_slot = p.slots.on_source;
    const int lanes = 1 << p.log2_lanes, lane = thread_index() & (lanes - 1);
    const uint32_t group = static_cast<uint32_t>(thread_index() >> p.log2_lanes);
    const uint32_t groups = kThreads >> p.log2_lanes;
    const int chunks =
        static_cast<int>(part.width * item_size(part.source.dtype) / static_cast<int64_t>(sizeof(Chunk)));
    const Chunk* from[kRows];
    Chunk* to[kRows];
    Fate fate[kRows];
    PW_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const Row r = locate(p, (block_x() * kRows + i) * groups + group, lane == 0);
        fate[i] = r.fate;
        from[i] = reinterpret_cast<const Chunk*>(pointers.source + offset_of(part.source, r, by_slot));
        to[i] = reinterpret_cast<Chunk*>(pointers.target + offset_of(part.target, r, !by_slot));
        if (part.target.scale_kind == ScaleKind::kTokenHead && lane == 0 && r.fate != Fate::kSkip) {
            float scale = 1.0f;
            if (r.fate == Fate::kMove) {
                scale = load_global(
                    reinterpret_cast<const float*>(pointers.source_scale + scale_offset_of(part.source, r, by_slot)));
            }
            store_global(reinterpret_cast<float*>(pointers.target_scale + scale_offset_of(part.target, r, !by_slot)),
                         scale);
        }
    }
    PW_NO_UNROLL
    for (int c = lane; c < chunks; c += lanes) {
        Chunk data[kRows];
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            data[i] = fate[i] == Fate::kMove ? read_chunk(from[i] + c) : zero_chunk<Chunk>();
        }
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            if (fate[i] != Fate::kSkip) store_global(to[i] + c, data[i]);
        }
    }
}

// Scales that belong to the layer or the head, not to a token.
template <int kLayers>
PW_DEVICE void copy_shared_scales(const MovePlan<kLayers>& p, const MovePart& part, const MovePointers& pointers) {
    const ScaleKind kind = part.target.scale_kind;
    if ((kind != ScaleKind::kTensor && kind != ScaleKind::kHead) || block_x() != 0) return;
    const uint32_t count = kind == ScaleKind::kHead ? p.num_heads : 1;
    for (uint32_t h = static_cast<uint32_t>(thread_index()); h < count; h += kThreads) {
        store_global(
            reinterpret_cast<float*>(pointers.target_scale + h * part.target.scale_stride_head),
            load_global(reinterpret_cast<const float*>(pointers.source_scale + h * part.source.scale_stride_head)));
    }
}

template <int kLayers>
PW_KERNEL(kThreads, 7)
void copy_kernel(const MovePlan<kLayers> p) {
    const int part_idx = static_cast<int>(block_y()) % p.num_parts;
    const MovePart& part = p.part[part_idx];
    const MovePointers& pointers = p.pointers[static_cast<int>(block_y()) / p.num_parts][part_idx];
    copy_shared_scales(p, part, pointers);
    switch (p.align) {
        case 16:
            return copy_rows<Vec16>(p, part, pointers);
        case 8:
            return copy_rows<Vec8>(p, part, pointers);
        case 4:
            return copy_rows<uint32_t>(p, part, pointers);
        case 2:
            return copy_rows<uint16_t>(p, part, pointers);
        default:
            return copy_rows<uint8_t>(p, part, pointers);
    }
}

// ---------------------------------------------------------------------------------- conversion

// kElements consecutive elements as fp32; `count` of them exist.
template <class T>
PW_DEVICE void load_elements(float (&x)[kElements], const char* p, int count, bool vector) {
    constexpr int kVectors = kElements * static_cast<int>(sizeof(T)) / 16;
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
    union Vector {
        Vec16 whole;
        T element[kPerVector];
        PW_DEVICE Vector() {}
    };
    if (vector) {
        PW_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            Vector u;
            u.whole = load_global(reinterpret_cast<const Vec16*>(p) + v);
            PW_UNROLL
            for (int i = 0; i < kPerVector; ++i) x[v * kPerVector + i] = to_float(u.element[i]);
        }
        return;
    }
    PW_UNROLL
    for (int i = 0; i < kElements; ++i) {
        x[i] = i < count ? to_float(load_global(reinterpret_cast<const T*>(p) + i)) : 0.0f;
    }
}

template <class T>
PW_DEVICE void store_elements(const float (&x)[kElements], char* p, int count, bool vector) {
    constexpr int kVectors = kElements * static_cast<int>(sizeof(T)) / 16;
    constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));
    union Vector {
        Vec16 whole;
        T element[kPerVector];
        PW_DEVICE Vector() {}
    };
    if (vector) {
        PW_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            Vector u;
            PW_UNROLL
            for (int i = 0; i < kPerVector; ++i) from_float(x[v * kPerVector + i], u.element[i]);
            store_global(reinterpret_cast<Vec16*>(p) + v, u.whole);
        }
        return;
    }
    PW_UNROLL
    for (int i = 0; i < kElements; ++i) {
        T y;
        from_float(x[i], y);
        if (i < count) store_global(reinterpret_cast<T*>(p) + i, y);
    }
}

PW_DEVICE void load_any(DType dtype, float (&x)[kElements], const char* p, int count, bool vector) {
    switch (dtype) {
        case DType::kFloat16:
            return load_elements<Float16>(x, p, count, vector);
        case DType::kBFloat16:
            return load_elements<BFloat16>(x, p, count, vector);
        case DType::kFloat32:
            return load_elements<float>(x, p, count, vector);
        case DType::kFloat8E4M3:
            return load_elements<Float8E4M3>(x, p, count, vector);
        case DType::kFloat8E5M2:
            return load_elements<Float8E5M2>(x, p, count, vector);
        case DType::kInt8:
            return load_elements<int8_t>(x, p, count, vector);
    }
}

PW_DEVICE void store_any(DType dtype, const float (&x)[kElements], char* p, int count, bool vector) {
    switch (dtype) {
        case DType::kFloat16:
            return store_elements<Float16>(x, p, count, vector);
        case DType::kBFloat16:
            return store_elements<BFloat16>(x, p, count, vector);
        case DType::kFloat32:
            return store_elements<float>(x, p, count, vector);
        case DType::kFloat8E4M3:
            return store_elements<Float8E4M3>(x, p, count, vector);
        case DType::kFloat8E5M2:
            return store_elements<Float8E5M2>(x, p, count, vector);
        case DType::kInt8:
            return store_elements<int8_t>(x, p, count, vector);
    }
}

PW_DEVICE float read_scale(const ByteSide& side, const char* base, const Row& r, bool by_slot) {
    if (side.scale_kind <= ScaleKind::kNumber) return side.scale_value;
    return load_global(reinterpret_cast<const float*>(base + scale_offset_of(side, r, by_slot)));
}

template <int kLayers>
PW_KERNEL(kThreads, 8)
void convert_kernel(const MovePlan<kLayers> p) {
    const int part_idx = static_cast<int>(block_y()) % p.num_parts;
    const MovePart& part = p.part[part_idx];
    const MovePointers& pointers = p.pointers[static_cast<int>(block_y()) / p.num_parts][part_idx];
    const ByteSide &source = part.source, &target = part.target;
    const bool by_slot = p.slots.on_source, vector = p.align == 16, make = part.how == MoveHow::kQuantise;
    const int lanes = 1 << p.log2_lanes, lane = thread_index() & (lanes - 1);
    const uint32_t group = static_cast<uint32_t>(thread_index() >> p.log2_lanes);
    const uint32_t groups = kThreads >> p.log2_lanes;
    PW_NO_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const Row r = locate(p, (block_x() * kRows + i) * groups + group, lane == 0);
        const char* from = pointers.source + offset_of(source, r, by_slot);
        char* to = pointers.target + offset_of(target, r, !by_slot);
        const bool moves = r.fate == Fate::kMove;
        float scale = 1.0f, divisor = 1.0f;
        if (moves) {
            scale = read_scale(source, pointers.source_scale, r, by_slot);
            if (!make) divisor = read_scale(target, pointers.target_scale, r, !by_slot);
        }
        float x[kElements];
        auto load = [&](int first) {
            const int count = part.width - first;
            if (moves && count > 0) {
                load_any(source.dtype, x, from + first * item_size(source.dtype), count, vector);
            } else {
                PW_UNROLL
                for (int e = 0; e < kElements; ++e) x[e] = 0.0f;
            }
            PW_UNROLL
            for (int e = 0; e < kElements; ++e) x[e] *= scale;
        };
        load(lane * kElements);
        if (make) {
            float amax = 0.0f;
            for (int first = lane * kElements; first < part.width; first += lanes * kElements) {
                if (first != lane * kElements) load(first);
                PW_UNROLL
                for (int e = 0; e < kElements; ++e) {
                    const float magnitude = x[e] < 0.0f ? -x[e] : x[e];
                    // neither NaN nor infinity counts
                    if (magnitude > amax && magnitude < infinity()) amax = magnitude;
                }
            }
            for (int mask = 1; mask < lanes; mask <<= 1) {
                const float other = shuffle_xor(amax, mask);
                amax = other > amax ? other : amax;
            }
            divisor = divide(amax, quant_max(target.dtype));
            if (divisor == 0.0f) divisor = 1.0f;
            if (lane == 0 && r.fate != Fate::kSkip) {
                store_global(reinterpret_cast<float*>(pointers.target_scale + scale_offset_of(target, r, !by_slot)),
                             divisor);
            }
            if (part.width > lanes * kElements) load(lane * kElements);
        }
        if (r.fate == Fate::kSkip) continue;
        for (int first = lane * kElements; first < part.width; first += lanes * kElements) {
            if (first != lane * kElements) load(first);
            if (is_quantised(target.dtype)) {
                PW_UNROLL
                for (int e = 0; e < kElements; ++e) x[e] = divide(x[e], divisor);
            }
            store_any(target.dtype, x, to + first * item_size(target.dtype), part.width - first, vector);
        }
    }
}

// ---------------------------------------------------------------------------------------- host

int64_t alignment(int64_t bits) { return bits ? std::min<int64_t>(bits & -bits, 16) : 16; }

ByteSide bytes_of(const MoveSide& side) {
    const int64_t item = item_size(side.dtype), scale_item = sizeof(float);
    const ScaleView& scale = side.scale;
    return {.dtype = side.dtype,
            .stride_page = side.stride_page * item,
            .stride_token = side.stride_token * item,
            .stride_head = side.stride_head * item,
            .scale_kind = scale.kind,
            .scale_value = scale.value,
            .scale_stride_page = scale.stride_page * scale_item,
            .scale_stride_token = scale.stride_token * scale_item,
            .scale_stride_head = scale.stride_head * scale_item};
}

MovePart part_of(const Move& m) {
    return {
        .width = static_cast<int>(m.width), .how = m.how, .source = bytes_of(m.source), .target = bytes_of(m.target)};
}

MovePointers pointers_of(const Move& m) {
    return {.source = m.source.data,
            .target = m.target.data,
            .source_scale = reinterpret_cast<const char*>(m.source.scale.data),
            .target_scale = reinterpret_cast<char*>(m.target.scale.data)};
}

// 16-byte units, or kElements, of the longest row; and what all addresses and strides are multiples of.
template <int kLayers>
int64_t align(MovePlan<kLayers>& p, int num_layers, bool copies) {
    int64_t bits = 0, units = 1;
    for (int i = 0; i < p.num_parts; ++i) {
        const MovePart& part = p.part[i];
        for (const ByteSide* side : {&part.source, &part.target}) {
            bits |= side->stride_page | side->stride_token | side->stride_head;
        }
        for (int layer = 0; layer < num_layers; ++layer) {
            const MovePointers& at = p.pointers[layer][i];
            bits |= reinterpret_cast<intptr_t>(at.source) | reinterpret_cast<intptr_t>(at.target);
        }
        if (copies) {
            bits |= part.width * item_size(part.source.dtype);
        } else if (part.width % kElements) {
            bits |= 1;  // element by element
        }
    }
    p.align = static_cast<int>(alignment(bits));
    for (int i = 0; i < p.num_parts; ++i) {
        const MovePart& part = p.part[i];
        units = std::max(units, copies ? part.width * item_size(part.source.dtype) / p.align
                                       : (part.width + kElements - 1) / kElements);
    }
    return units;
}

ErrorKind error_kind_of(const MoveParams& p) {
    return p.is_append ? ErrorKind::kAppendSlot : p.to_cache ? ErrorKind::kUnpackSlot : ErrorKind::kPackSlot;
}

template <int kLayers>
void run(const MoveParams& q, const Move* moves, int num_layers, const Call& call) {
    MovePlan<kLayers> p{};
    p.num_parts = q.num_parts;
    p.slots = {.index = q.slots,
               .num_slots = q.num_slots,
               .page_size = q.page_size,
               .on_source = !q.to_cache,
               .skip_negative = q.is_append,
               .error_kind = error_kind_of(q),
               .error_word = call.error_word};
    p.num_rows = static_cast<uint32_t>(q.slots.size * q.num_heads);
    p.num_tokens = static_cast<uint32_t>(q.slots.size);
    p.num_heads = static_cast<uint32_t>(q.num_heads);
    for (int i = 0; i < q.num_parts; ++i) {
        p.part[i] = part_of(moves[i]);
        for (int layer = 0; layer < num_layers; ++layer) {
            p.pointers[layer][i] = pointers_of(moves[layer * q.num_parts + i]);
        }
    }
    const bool copies = moves[0].how == MoveHow::kCopy;  // K and V alike
    const int64_t units = align(p, num_layers, copies);
    while ((1 << p.log2_lanes) < units && p.log2_lanes < 5) ++p.log2_lanes;
    const ByteSide& paged = q.to_cache ? p.part[0].target : p.part[0].source;
    p.head_fastest = paged.stride_head <= paged.stride_token;
    const int64_t rows_per_block = int64_t(kThreads >> p.log2_lanes) * kRows;
    const LaunchConfig config{.name = copies ? "copy_kernel" : "convert_kernel",
                              .grid_x = (int64_t(p.num_rows) + rows_per_block - 1) / rows_per_block,
                              .grid_y = num_layers * q.num_parts,
                              .num_threads = kThreads,
                              .shared_bytes = 0,
                              .stream = call.stream};
    launch(copies ? copy_kernel<kLayers> : convert_kernel<kLayers>, config, p);
}

// How many layers from the first on have the same strides and scales: these are one launch.
int num_alike(const MoveParams& p, const Move* moves, int num_layers) {
    for (int layer = 1; layer < num_layers; ++layer) {
        for (int i = 0; i < p.num_parts; ++i) {
            if (!(part_of(moves[layer * p.num_parts + i]) == part_of(moves[i]))) return layer;
        }
    }
    return num_layers;
}

}  // namespace

void move(const MoveParams& p, const Call& call) {
    const int64_t num_rows = p.slots.size * p.num_heads;
    if (num_rows == 0 || p.num_moves == 0) return;  // a grid without blocks is an error
    if (num_rows >= (int64_t(1) << 31)) {
        throw std::invalid_argument("pagewire: expected fewer than 2^31 rows (tokens * heads), got " +
                                    std::to_string(num_rows));
    }
    UseDevice guard(call.device);
    int left = static_cast<int>(p.num_moves / p.num_parts);
    for (const Move* moves = p.moves; left > 0;) {
        const int layers = std::min(kManyLayers, num_alike(p, moves, left));
        if (layers == 1) {
            run<1>(p, moves, layers, call);
        } else if (layers <= kUsualLayers) {
            run<kUsualLayers>(p, moves, layers, call);
        } else {
            run<kManyLayers>(p, moves, layers, call);
        }
        moves += layers * p.num_parts;
        left -= layers;
    }
}

}  // namespace pagewire
