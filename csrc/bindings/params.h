// The arguments of the ops as C++ has them: one reading for every backend, each field by its name.
#pragma once

#include <vector>

#include "bindings/views.h"
#include "pagewire/params.h"

namespace pagewire::bindings {

// modifiers: a Modifiers of pagewire/types.py. cu_seqlens_q: None for decode.
inline AttentionParams attention_params(const char* op, py::handle q, py::handle k_cache, py::handle v_cache,
                                        py::handle page_table, py::handle seq_lens, py::handle cu_seqlens_q,
                                        py::handle modifiers, py::handle out, py::handle lse) {
    static const Name kSoftmaxScale("softmax_scale");
    static const Name kCausal("causal");
    static const Name kWindowLeft("window_left");
    static const Name kWindowRight("window_right");
    static const Name kSoftcap("softcap");
    static const Name kAlibiSlopes("alibi_slopes");
    static const Name kSinks("sinks");
    static const Name kKScale("k_scale");
    static const Name kVScale("v_scale");
    static const Name kSplitSize("split_size");
    static const Name kMaxQLen("max_q_len");
    const auto count = [&](const Name& name) {
        const py::object value = name.of(modifiers);
        return value.is_none() ? int64_t(0) : value.cast<int64_t>();
    };
    return {.op = op,
            .q = rows_view(Tensor(q)),
            .k = cache_view(k_cache),
            .v = cache_view(v_cache),
            .page_table = page_table_view(page_table),
            .seq_lens = index_view(seq_lens),
            .cu_seqlens_q = index_view(cu_seqlens_q),
            .out = rows_view(Tensor(out)),
            .lse = matrix_view(lse),
            .softmax_scale = kSoftmaxScale.of(modifiers).cast<float>(),
            .causal = kCausal.of(modifiers).cast<bool>(),
            .window_left = kWindowLeft.of(modifiers).cast<int64_t>(),
            .window_right = kWindowRight.of(modifiers).cast<int64_t>(),
            .softcap = kSoftcap.of(modifiers).cast<float>(),
            .alibi_slopes = matrix_view(kAlibiSlopes.of(modifiers)),
            .sinks = matrix_view(kSinks.of(modifiers)),
            .k_scale = scale_view(kKScale.of(modifiers)),
            .v_scale = scale_view(kVScale.of(modifiers)),
            .split_size = count(kSplitSize),
            .max_q_len = count(kMaxQLen)};
}

// MoveParams and the list they point into.
struct Movement {
    MoveParams params{};
    std::vector<Move> moves;
};

// Of packed rows: None, or fp32 [num_layers], [num_layers, num_heads], [num_layers, num_tokens, num_heads].
inline ScaleView row_scale_view(py::handle scales, int64_t layer) {
    if (scales.is_none()) return {};
    const Tensor t(scales);
    ScaleView s{.kind = ScaleKind::kTensor, .data = t.as<float>() + layer * t.stride[0]};
    if (t.dims > 1) s.kind = ScaleKind::kHead, s.stride_head = t.stride[t.dims - 1];
    if (t.dims > 2) s.kind = ScaleKind::kTokenHead, s.stride_token = t.stride[1];
    return s;
}

inline MoveSide paged_side(const CacheView& cache, const ScaleView& scale) {
    return {.data = cache.data,
            .dtype = cache.dtype,
            .stride_page = cache.stride_page,
            .stride_token = cache.stride_token,
            .stride_head = cache.stride_head,
            .scale = scale};
}

// rows: [num_layers, num_tokens, num_heads, width], or without the first dim of the one layer.
inline MoveSide dense_side(const Tensor& rows, int64_t layer, const ScaleView& scale) {
    const RowsView of_first = rows_view(rows);
    const int64_t behind = rows.dims == 4 ? layer * rows.stride[0] : 0;
    return {.data = of_first.data + behind * item_size(of_first.dtype),
            .dtype = of_first.dtype,
            .stride_page = 0,
            .stride_token = of_first.stride_row,
            .stride_head = of_first.stride_head,
            .scale = scale};
}

// movement: a Movement of pagewire/moves.py.
inline Movement movement_of(py::handle movement) {
    static const Name kOp("op");
    static const Name kParts("parts");
    static const Name kSlots("slots");
    static const Name kCaches("caches");
    static const Name kCacheScales("cache_scales");
    static const Name kRows("rows");
    static const Name kRowScales("row_scales");
    static const Name kHow("how");
    Movement m;
    MoveParams& p = m.params;
    const auto op = kOp.of(movement).cast<std::string>();
    p.op = op == "append_kv" ? "append_kv" : op == "pack_kv" ? "pack_kv" : "unpack_kv";
    p.is_append = op == "append_kv";
    p.to_cache = op != "pack_kv";
    p.slots = index_view(kSlots.of(movement));
    const auto parts = kParts.of(movement).cast<py::tuple>();
    p.num_parts = static_cast<int>(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
        const py::object part = parts[i];
        const auto caches = kCaches.of(part).cast<py::sequence>();
        const auto scales = kCacheScales.of(part).cast<py::sequence>();
        const Tensor rows(kRows.of(part));
        const py::object row_scales = kRowScales.of(part);
        const auto how = static_cast<MoveHow>(kHow.of(part).cast<int>());
        m.moves.resize(caches.size() * parts.size());
        for (size_t layer = 0; layer < caches.size(); ++layer) {
            const CacheView cache = cache_view(caches[layer]);
            p.page_size = cache.page_size;
            p.num_slots = cache.num_pages * cache.page_size;
            p.num_heads = cache.num_kv_heads;
            const auto index = static_cast<int64_t>(layer);
            const MoveSide paged = paged_side(cache, scales.empty() ? ScaleView{} : scale_view(scales[layer]));
            const MoveSide dense = dense_side(rows, index, row_scale_view(row_scales, index));
            m.moves[layer * parts.size() + i] = {.source = p.to_cache ? dense : paged,
                                                 .target = p.to_cache ? paged : dense,
                                                 .width = cache.width,
                                                 .how = how};
        }
    }
    p.moves = m.moves.data();
    p.num_moves = static_cast<int64_t>(m.moves.size());
    return m;
}

inline StateView state_view(py::handle out, py::handle lse) {
    return {.out = rows_view(Tensor(out)), .lse = matrix_view(lse)};
}

// Of two states that lie anywhere.
inline MergeParams merge_params(const StateView& a, const StateView& b, py::handle out, py::handle lse) {
    return {.first = a,
            .second = b,
            .stride_out = 0,
            .stride_lse = 0,
            .n = 2,
            .out = rows_view(Tensor(out)),
            .lse = matrix_view(lse),
            .sinks = {}};
}

// outs: [n, num_rows, num_heads, width], lses: [n, num_rows, num_heads], n >= 1.
inline MergeParams merge_params(py::handle outs, py::handle lses, py::handle out, py::handle lse) {
    const Tensor values(outs);
    const Tensor logs(lses);
    const StateView first = state_view(outs, lses);
    MergeParams p = merge_params(first, first, out, lse);
    p.n = values.shape[0];
    p.stride_out = values.stride[0];
    p.stride_lse = logs.stride[0];
    if (p.n > 1) {
        p.second.out.data += p.stride_out * item_size(first.out.dtype);
        p.second.lse.data += p.stride_lse;
    }
    return p;
}

}  // namespace pagewire::bindings
