// Rows that keep their bytes.
//
// grid: [ceil(num_rows / rows_of_block) * pieces, ceil(num_layers * num_parts / planes_per_block)]. A block finds its
// rows once and copies them in each of its planes. Its threads take units of 16 bytes (fewer where something is not
// aligned), one after another as they lie in the rows; a row longer than the block's units is several blocks' pieces.
//
// Roof: the device's memory, half of it reading. Plan: 128 threads, 64 registers, 8 blocks a multiprocessor: kUnits *
// 16 bytes in flight a thread are 64 KiB a multiprocessor, where half of 4.8 TB/s for 0.8 us asks for 15. At most 20
// instructions per unit, with 64 planes.
#pragma once

#include "cuda/move/planes.h"
#include "cuda/move/rows.h"

namespace pagewire::moving {

constexpr int kUnits = 4;  // in flight a thread

PW_DEVICE Vec16 read_unit(const Vec16* p) { return load_streaming(p); }
template <class Unit>
PW_DEVICE Unit read_unit(const Unit* p) {
    return load_global(p);
}

// Of a thread: units kThreads apart in the block's share of rows; bytes from a plane's pointers.
struct Units {
    int64_t from[kUnits], to[kUnits];
    Fate fate[kUnits];
};

template <int kLayers>
PW_DEVICE Units units_of_thread(const Plan<kLayers>& p, int part) {
    const uint32_t group = p.pieces.quotient(block_x()), piece = block_x() - group * p.pieces.divisor;
    uint32_t index[kUnits], unit[kUnits];  // of the row
    PW_UNROLL
    for (int i = 0; i < kUnits; ++i) {
        const uint32_t at = static_cast<uint32_t>(i * kThreads + thread_index()), row = p.units.quotient(at);
        index[i] = row < p.rows_of_block ? group * p.rows_of_block + row : p.rows.num_rows;
        unit[i] = piece * p.units.divisor + at - row * p.units.divisor;
    }
    Row row[kUnits];
    locate(p.rows, index, row, block_y() == 0);
    const uint32_t row_bytes = static_cast<uint32_t>(p.part[part].width * item_size(p.part[part].source.dtype));
    Units u;
    PW_UNROLL
    for (int i = 0; i < kUnits; ++i) {
        const Offsets offsets = offsets_of(p.rows, p.part[part], row[i]);
        const uint32_t byte = unit[i] * static_cast<uint32_t>(p.align);
        u.from[i] = offsets.source + byte;
        u.to[i] = offsets.target + byte;
        u.fate[i] = byte < row_bytes ? row[i].fate : Fate::kSkip;
    }
    return u;
}

// kAll: every unit of the thread moves, as nearly always.
template <class Unit, bool kAll, int kLayers>
PW_DEVICE void copy_planes(const Plan<kLayers>& p, int part, Run layers, const Units& u) {
    PW_NO_UNROLL
    for (int layer = layers.first; layer < layers.last; ++layer) {
        const Plane& plane = p.plane[layer][part];
        Unit data[kUnits];
        PW_UNROLL
        for (int i = 0; i < kUnits; ++i) {
            data[i] = Unit{};
            if (kAll || u.fate[i] == Fate::kMove) {
                data[i] = read_unit(reinterpret_cast<const Unit*>(plane.source + u.from[i]));
            }
        }
        PW_UNROLL
        for (int i = 0; i < kUnits; ++i) {
            if (kAll || u.fate[i] != Fate::kSkip) {
                store_global(reinterpret_cast<Unit*>(plane.target + u.to[i]), data[i]);
            }
        }
    }
}

template <class Unit, int kLayers>
PW_DEVICE void copy_units(const Plan<kLayers>& p, int part, Run layers, const Units& u) {
    bool all = true;
    PW_UNROLL
    for (int i = 0; i < kUnits; ++i) all = all && u.fate[i] == Fate::kMove;
    all ? copy_planes<Unit, true>(p, part, layers, u) : copy_planes<Unit, false>(p, part, layers, u);
}

// A thread a row.
template <int kLayers>
PW_DEVICE void copy_token_scales(const Plan<kLayers>& p, int part, Run layers) {
    const uint32_t group = p.pieces.quotient(block_x()), first = group * p.rows_of_block;
    if (group * p.pieces.divisor != block_x()) return;  // not the rows' first piece
    PW_NO_UNROLL
    for (uint32_t i = static_cast<uint32_t>(thread_index()); i < p.rows_of_block; i += kThreads) {
        const uint32_t index[1] = {first + i};
        Row row[1];
        locate(p.rows, index, row, false);
        if (row[0].fate == Fate::kSkip) continue;
        const Offsets offsets = scale_offsets_of(p.rows, p.part[part], row[0]);
        PW_UNROLL_BY(4)
        for (int layer = layers.first; layer < layers.last; ++layer) {
            const Plane& plane = p.plane[layer][part];
            const float scale = row[0].fate == Fate::kMove ? load_global(plane.source_scale + offsets.source) : 1.0f;
            store_global(plane.target_scale + offsets.target, scale);
        }
    }
}

// Scales that belong to the layer or to the head, not to a token.
template <int kLayers>
PW_DEVICE void copy_shared_scales(const Plan<kLayers>& p, int part, Run layers) {
    if (block_x() != 0) return;
    const ScaleView &source = p.part[part].source.scale, &target = p.part[part].target.scale;
    const uint32_t count = target.kind == ScaleKind::kHead ? p.num_heads : 1;
    PW_NO_UNROLL
    for (int layer = layers.first; layer < layers.last; ++layer) {
        const Plane& plane = p.plane[layer][part];
        for (uint32_t h = static_cast<uint32_t>(thread_index()); h < count; h += kThreads) {
            store_global(plane.target_scale + h * target.stride_head,
                         load_global(plane.source_scale + h * source.stride_head));
        }
    }
}

template <int kLayers>
PW_KERNEL(kThreads, 8)
void copy_kernel(const Plan<kLayers> p) {
    Units u;
    bool located = false;
    PW_NO_UNROLL
    for (int part = 0; part < p.num_parts; ++part) {
        const Run layers = layers_of(p, part);
        if (layers.first >= layers.last) continue;
        if (!located || !p.parts_alike) u = units_of_thread(p, part);
        located = true;
        switch (p.align) {
            case 16:
                copy_units<Vec16>(p, part, layers, u);
                break;
            case 8:
                copy_units<Vec8>(p, part, layers, u);
                break;
            case 4:
                copy_units<uint32_t>(p, part, layers, u);
                break;
            case 2:
                copy_units<uint16_t>(p, part, layers, u);
                break;
            default:
                copy_units<uint8_t>(p, part, layers, u);
        }
        const ScaleKind kind = p.part[part].target.scale.kind;
        if (kind == ScaleKind::kTokenHead) copy_token_scales(p, part, layers);
        if (kind == ScaleKind::kTensor || kind == ScaleKind::kHead) copy_shared_scales(p, part, layers);
    }
}

}  // namespace pagewire::moving
