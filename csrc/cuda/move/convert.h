// Rows that change their dtype or scale.
//
// grid: [ceil(num_rows / rows of a block), ceil(num_layers * num_parts / planes_per_block)]. A block finds its rows once
// and converts them in each of its planes. 2^log2_lanes lanes share a row, kElements a lane at a time; a row that is
// longer is read twice if its scale is made here. The next plane's chunk is on its way while this one is computed.
//
// Roof: the device's memory. bf16 to an 8-bit cache reads two thirds of what it moves. Plan: 128 threads, 72 registers,
// 7 blocks a multiprocessor: a chunk in flight a thread is 28 KiB of bf16 a multiprocessor, where two thirds of 4.8
// TB/s for 0.8 us ask for 20; 8 blocks of 64 registers spill. At most 345 instructions a chunk (16 elements, 48 bytes).
#pragma once

#include "cuda/move/chunk.h"
#include "cuda/move/planes.h"
#include "cuda/move/rows.h"
#include "cuda/quotient.h"

namespace pagewire::moving {

// A lane's part of a row, in bytes and in scales from a plane's pointers.
struct Place {
    int64_t from, to, scale_from, scale_to;
    Fate fate;
};

template <int kElements, int kLayers>
PW_DEVICE Place place_of_thread(const Plan<kLayers>& p, int part, int lane) {
    const uint32_t index[1] = {block_x() * (kThreads >> p.log2_lanes) +
                               static_cast<uint32_t>(thread_index() >> p.log2_lanes)};
    Row row[1];
    locate(p.rows, index, row, lane == 0 && block_y() == 0);
    const Move& of = p.part[part];
    const Offsets bytes = offsets_of(p.rows, of, row[0]), scales = scale_offsets_of(p.rows, of, row[0]);
    const uint32_t element = static_cast<uint32_t>(lane * kElements);
    return {.from = bytes.source + element * static_cast<uint32_t>(item_size(of.source.dtype)),
            .to = bytes.target + element * static_cast<uint32_t>(item_size(of.target.dtype)),
            .scale_from = scales.source,
            .scale_to = scales.target,
            .fate = row[0].fate};
}

PW_DEVICE float scale_of(const ScaleView& scale, const float* data, int64_t at) {
    return scale.kind <= ScaleKind::kNumber ? scale.value : load_global(data + at);
}

// A chunk on its way, and the scale of its row.
template <int kElements>
struct Request {
    Chunk<kElements> chunk;
    float scale;
};

// `element`: from the lane's first on; past the row's end are zeros.
template <int kElements, int kLayers>
PW_DEVICE Request<kElements> request(const Plan<kLayers>& p, int part, int layer, const Place& at, int element,
                                     int lane) {
    const MoveSide& source = p.part[part].source;
    const Plane& plane = p.plane[layer][part];
    const int item = static_cast<int>(item_size(source.dtype));
    const bool exists = at.fate == Fate::kMove && element + lane * kElements < p.part[part].width;
    return {.chunk = load_chunk(plane.source + at.from + element * item, exists ? item : 0, Chunk<kElements>{}),
            .scale = exists ? scale_of(source.scale, plane.source_scale, at.scale_from) : 1.0f};
}

template <int kElements>
PW_DEVICE void values_of(const MoveSide& source, const Request<kElements>& r, float (&x)[kElements]) {
    widen(source.dtype, r.chunk, x);
    if (source.scale.kind == ScaleKind::kNone) return;
    PW_UNROLL
    for (int e = 0; e < kElements; ++e) x[e] *= r.scale;
}

// Infinity counts, NaN does not.
template <int kElements>
PW_DEVICE float largest_of(const float (&x)[kElements]) {
    float largest = 0.0f;
    PW_UNROLL
    for (int e = 0; e < kElements; ++e) largest = max_number(largest, magnitude(x[e]));
    return largest;
}

template <int kElements>
PW_DEVICE float largest_finite_of(const float (&x)[kElements], float largest) {
    if (largest < infinity()) return largest;
    largest = 0.0f;
    PW_UNROLL
    for (int e = 0; e < kElements; ++e) {
        if (magnitude(x[e]) < infinity()) largest = max_number(largest, magnitude(x[e]));
    }
    return largest;
}

template <int kElements>
PW_DEVICE void divide_all(float (&x)[kElements], float largest, const Reciprocal& by) {
    if (is_plain(by, largest)) {
        PW_UNROLL
        for (int e = 0; e < kElements; ++e) x[e] = quotient(x[e], by);
    } else {
        PW_UNROLL
        for (int e = 0; e < kElements; ++e) x[e] = any_quotient(x[e], by);
    }
}

template <int kLayers, int kElements>
PW_KERNEL(kThreads, 7)
void convert_kernel(const Plan<kLayers> p) {
    const int lanes = 1 << p.log2_lanes, lane = thread_index() & (lanes - 1), stride = lanes * kElements;
    Place at{};
    bool located = false;
    PW_NO_UNROLL
    for (int part = 0; part < p.num_parts; ++part) {
        const Run layers = layers_of(p, part);
        if (layers.first >= layers.last) continue;
        if (!located || !p.parts_alike) at = place_of_thread<kElements>(p, part, lane);
        located = true;
        const MoveSide &source = p.part[part].source, &target = p.part[part].target;
        const int width = static_cast<int>(p.part[part].width), item = static_cast<int>(item_size(target.dtype));
        auto next = request<kElements>(p, part, layers.first, at, 0, lane);
        PW_NO_UNROLL
        for (int layer = layers.first; layer < layers.last; ++layer) {
            const Plane& plane = p.plane[layer][part];
            float x[kElements], divisor = 1.0f, amax = 0.0f;
            values_of(source, next, x);
            float largest = largest_of(x);
            if (layer + 1 < layers.last) next = request<kElements>(p, part, layer + 1, at, 0, lane);
            bool scale_is_known = p.part[part].how == MoveHow::kConvert;
            const bool read_twice = !scale_is_known && width > stride;
            if (scale_is_known && at.fate == Fate::kMove) {
                divisor = scale_of(target.scale, plane.target_scale, at.scale_to);
            }
            // the row's chunks: once where the scale is known, else once more before
            PW_NO_UNROLL
            for (int element = 0; element < width;) {
                if (element > 0 || (scale_is_known && read_twice)) {
                    values_of(source, request<kElements>(p, part, layer, at, element, lane), x);
                    largest = largest_of(x);
                }
                if (!scale_is_known) {
                    amax = max_number(amax, largest_finite_of(x, largest));
                } else if (at.fate != Fate::kSkip && element + lane * kElements < width) {
                    if (is_quantised(target.dtype)) divide_all(x, largest, reciprocal_of(divisor));
                    store_as(target.dtype, x, plane.target + at.to + element * item);
                }
                element += stride;
                if (element >= width && !scale_is_known) {
                    PW_NO_UNROLL
                    for (int mask = 1; mask < lanes; mask <<= 1) amax = max_number(amax, shuffle_xor(amax, mask));
                    divisor = divide(amax, quant_max(target.dtype));
                    if (divisor == 0.0f) divisor = 1.0f;
                    if (lane == 0 && at.fate != Fate::kSkip) store_global(plane.target_scale + at.scale_to, divisor);
                    scale_is_known = true;
                    element = 0;
                }
            }
        }
    }
}

}  // namespace pagewire::moving
