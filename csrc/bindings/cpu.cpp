// pagewire._cpu: one function per op. Tensors arrive as (data_ptr, dtype code, shape, strides),
// checked by the public functions; what would be unsafe in memory (page ids, slots, lengths) is
// checked again inside. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "pagewire/check.h"

namespace py = pybind11;

namespace pagewire::bindings {
namespace {

using cpu::Kernels;

constexpr int kMaxDims = 4;
constexpr int kInt32 = 6, kInt64 = 7;  // dtype codes past those of DType

struct Tensor {
    char* data;
    int dtype, dims;
    int64_t shape[kMaxDims], stride[kMaxDims];

    // From (data_ptr, dtype code, shape, strides), in elements.
    explicit Tensor(const py::tuple& t) {
        data = reinterpret_cast<char*>(t[0].cast<uintptr_t>());
        dtype = t[1].cast<int>();
        const py::tuple shapes = t[2], strides = t[3];
        dims = int(shapes.size());
        if (dims > kMaxDims) throw std::invalid_argument("a tensor of more than 4 dims");
        for (int i = 0; i < dims; ++i) {
            shape[i] = shapes[i].cast<int64_t>();
            stride[i] = strides[i].cast<int64_t>();
        }
    }
    DType float_dtype() const { return static_cast<DType>(dtype); }
};

CacheView cache_view(const py::tuple& tuple) {
    const Tensor t(tuple);
    return {t.data,     t.float_dtype(), t.shape[0],  t.shape[1], t.shape[2],
            t.shape[3], t.stride[0],     t.stride[1], t.stride[2]};
}

RowsView rows_view(const Tensor& t, int first = 0) {
    return {t.data,          t.float_dtype(),    t.shape[first], t.shape[first + 1], t.shape[first + 2],
            t.stride[first], t.stride[first + 1]};
}

// [rows, heads] or [heads] (the same for every row); None: null.
MatrixView matrix_view(const py::object& object) {
    if (object.is_none()) return {};
    const Tensor t(object);
    auto* data = reinterpret_cast<float*>(t.data);
    return t.dims == 1 ? MatrixView{data, 0, t.stride[0]} : MatrixView{data, t.stride[0], t.stride[1]};
}

IndexView index_view(const py::tuple& tuple) {
    const Tensor t(tuple);
    return {t.data, t.dtype == kInt64, t.shape[0], t.stride[0]};
}

// None, a float (kept in `storage`), or a tensor [], [heads], [batch_size, heads], [num_pages, page_size, heads].
ScaleView scale_view(const py::object& object, float& storage) {
    if (object.is_none()) return {};
    if (!py::isinstance<py::tuple>(object)) {
        storage = object.cast<float>();
        return {ScaleKind::kTensor, &storage, 0, 0, 0, 0};
    }
    const Tensor t(object);
    auto* data = reinterpret_cast<float*>(t.data);
    switch (t.dims) {
        case 0:
            return {ScaleKind::kTensor, data, 0, 0, 0, 0};
        case 1:
            return {ScaleKind::kHead, data, 0, 0, 0, t.stride[0]};
        case 2:
            return {ScaleKind::kBatchHead, data, t.stride[0], 0, 0, t.stride[1]};
        default:
            return {ScaleKind::kTokenHead, data, 0, t.stride[0], t.stride[1], t.stride[2]};
    }
}

// modifiers: (softmax_scale, causal, window_left, window_right, softcap, alibi_slopes, sinks,
// k_scale, v_scale, split_size or 0, max_q_len or 0).
void attention(AttentionParams p, const py::tuple& q, const py::tuple& k_cache, const py::tuple& v_cache,
               const py::tuple& page_table, const py::tuple& seq_lens, const py::tuple& modifiers, const py::tuple& out,
               const py::object& lse, const Kernels& kernels, int num_threads) {
    float k_storage, v_storage;
    p.q = rows_view(Tensor(q));
    p.k = cache_view(k_cache);
    p.v = cache_view(v_cache);
    const Tensor table(page_table);
    p.page_table = {reinterpret_cast<const int32_t*>(table.data), table.shape[0], table.shape[1], table.stride[0]};
    p.seq_lens = index_view(seq_lens);
    p.out = rows_view(Tensor(out));
    p.lse = matrix_view(lse);
    p.softmax_scale = modifiers[0].cast<float>();
    p.causal = modifiers[1].cast<bool>();
    p.window_left = modifiers[2].cast<int64_t>();
    p.window_right = modifiers[3].cast<int64_t>();
    p.softcap = modifiers[4].cast<float>();
    p.alibi_slopes = matrix_view(modifiers[5]);
    p.sinks = matrix_view(modifiers[6]);
    p.k_scale = scale_view(modifiers[7], k_storage);
    p.v_scale = scale_view(modifiers[8], v_storage);
    p.split_size = modifiers[9].cast<int64_t>();
    p.max_q_len = modifiers[10].cast<int64_t>();
    py::gil_scoped_release release;
    cpu::attention(p, kernels, num_threads);
}

void decode(const py::tuple& q, const py::tuple& k_cache, const py::tuple& v_cache, const py::tuple& page_table,
            const py::tuple& seq_lens, const py::tuple& modifiers, const py::tuple& out, const py::object& lse,
            const Kernels& kernels, int num_threads) {
    AttentionParams p{};
    p.op = "decode";
    attention(p, q, k_cache, v_cache, page_table, seq_lens, modifiers, out, lse, kernels, num_threads);
}

void prefill(const py::tuple& q, const py::tuple& k_cache, const py::tuple& v_cache, const py::tuple& page_table,
             const py::tuple& seq_lens, const py::tuple& cu_seqlens_q, const py::tuple& modifiers, const py::tuple& out,
             const py::object& lse, const Kernels& kernels, int num_threads) {
    AttentionParams p{};
    p.op = "prefill";
    p.cu_seqlens_q = index_view(cu_seqlens_q);
    attention(p, q, k_cache, v_cache, page_table, seq_lens, modifiers, out, lse, kernels, num_threads);
}

// Of one layer's K or V: `rows` [heads, tokens, width] or [tokens, heads, width], `cache` [pages,
// page_size, heads, width].
MoveParams::Side rows_side(const Tensor& rows, int token_dim) {
    return {rows.data, rows.float_dtype(), 0, rows.stride[token_dim], rows.stride[1 - token_dim], {}};
}

MoveParams::Side cache_side(const CacheView& cache) {
    return {cache.data, cache.dtype, cache.stride_page, cache.stride_token, cache.stride_head, {}};
}

// A scale on the side of packed rows: [], [heads] or [heads, tokens].
ScaleView packed_scale(const py::object& object) {
    if (object.is_none()) return {};
    const Tensor t(object);
    auto* data = reinterpret_cast<float*>(t.data);
    if (t.dims == 2) return {ScaleKind::kTokenHead, data, 0, 0, t.stride[1], t.stride[0]};
    return {t.dims == 0 ? ScaleKind::kTensor : ScaleKind::kHead, data, 0, 0, 0, t.dims == 0 ? 0 : t.stride[0]};
}

MoveParams move_params(const CacheView& cache, const IndexView& slots, bool to_slots) {
    MoveParams m{};
    m.slots = slots;
    m.page_size = cache.page_size;
    m.num_heads = cache.num_kv_heads;
    m.width = cache.width;
    m.to_slots = to_slots;
    return m;
}

// Values become stored ones: a scale per token and head is made, others are read.
void quantise_into(MoveParams& m, const ScaleView& scale) {
    m.copy = m.source.dtype == m.target.dtype && !is_quantised(m.target.dtype);
    if (is_quantised(m.target.dtype)) m.target.scale = scale;
    m.make_scale = m.target.scale.kind == ScaleKind::kTokenHead;
}

void append_kv(const py::tuple& k, const py::tuple& v, const py::tuple& k_cache, const py::tuple& v_cache,
               const py::tuple& slot_mapping, const py::object& k_scale, const py::object& v_scale,
               const Kernels& kernels, int num_threads) {
    const IndexView slots = index_view(slot_mapping);
    float storage[2];
    std::vector<MoveParams> moves;
    int64_t num_slots = 0;
    int i = 0;
    for (const auto& [rows, tuple, scale] : {std::tie(k, k_cache, k_scale), std::tie(v, v_cache, v_scale)}) {
        const CacheView cache = cache_view(tuple);
        num_slots = cache.num_pages * cache.page_size;
        MoveParams m = move_params(cache, slots, true);
        m.skip_negative = true;
        m.source = rows_side(Tensor(rows), 0);
        m.target = cache_side(cache);
        quantise_into(m, scale_view(scale, storage[i++]));
        moves.push_back(m);
    }
    py::gil_scoped_release release;
    cpu::move("append_kv", "slot_mapping", num_slots, moves, kernels, num_threads);
}

// layers: (cache, scale or None, packed rows [heads, tokens, width], packed scale or None) per
// layer and K or V.
void pack_kv(const std::vector<py::tuple>& layers, const py::tuple& slot_tuple, const Kernels& kernels,
             int num_threads) {
    const IndexView slots = index_view(slot_tuple);
    float unused;
    std::vector<MoveParams> moves;
    int64_t num_slots = 0;
    for (const py::tuple& layer : layers) {
        const CacheView cache = cache_view(layer[0]);
        num_slots = cache.num_pages * cache.page_size;
        MoveParams m = move_params(cache, slots, false);
        m.source = cache_side(cache);
        m.target = rows_side(Tensor(layer[2]), 1);
        m.source.scale = scale_view(layer[1], unused);
        m.target.scale = packed_scale(layer[3]);
        m.copy = m.source.dtype == m.target.dtype;
        m.make_scale = !m.copy && m.target.scale.kind != ScaleKind::kNone;
        moves.push_back(m);
    }
    py::gil_scoped_release release;
    cpu::move("pack_kv", "slots", num_slots, moves, kernels, num_threads);
}

// layers: (packed rows, packed scale or None, cache, scale or None) per layer and K or V.
void unpack_kv(const std::vector<py::tuple>& layers, const py::tuple& slot_tuple, const Kernels& kernels,
               int num_threads) {
    const IndexView slots = index_view(slot_tuple);
    float unused;
    std::vector<MoveParams> moves;
    int64_t num_slots = 0;
    for (const py::tuple& layer : layers) {
        const CacheView cache = cache_view(layer[2]);
        num_slots = cache.num_pages * cache.page_size;
        MoveParams m = move_params(cache, slots, true);
        m.source = rows_side(Tensor(layer[0]), 1);
        m.target = cache_side(cache);
        m.source.scale = packed_scale(layer[1]);
        const ScaleView scale = scale_view(layer[3], unused);
        quantise_into(m, scale);
        if (m.source.scale.kind == ScaleKind::kTokenHead && m.make_scale && m.source.dtype == m.target.dtype) {
            m.copy = true;
            m.make_scale = false;
        }
        moves.push_back(m);
    }
    py::gil_scoped_release release;
    cpu::move("unpack_kv", "slots", num_slots, moves, kernels, num_threads);
}

// states: (out [rows, heads, width], lse [rows, heads]) each.
void merge_states(const std::vector<py::tuple>& states, const py::tuple& out, const py::object& lse,
                  const Kernels& kernels, int num_threads) {
    std::vector<RowsView> outs;
    std::vector<MatrixView> lses;
    for (const py::tuple& state : states) {
        outs.push_back(rows_view(Tensor(state[0])));
        lses.push_back(matrix_view(state[1]));
    }
    const MergeParams p{outs.data(), lses.data(), int64_t(states.size()), rows_view(Tensor(out)), matrix_view(lse), {}};
    py::gil_scoped_release release;
    cpu::merge_states(p, kernels, num_threads);
}

}  // namespace
}  // namespace pagewire::bindings

PYBIND11_MODULE(_cpu, m) {
    using namespace pagewire::bindings;
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const pagewire::BadIndex& e) {
            const py::object type = py::module_::import("pagewire.errors").attr("BadIndexError");
            PyErr_SetString(type.ptr(), e.what());
        }
    });
    py::class_<Kernels>(m, "Kernels").def_readonly("name", &Kernels::name);
    m.def("choose_kernels", &pagewire::cpu::choose_kernels, py::return_value_policy::reference, py::arg("name"));
    m.def("usable_isas", [] {
        std::vector<std::string> names;
        for (const Kernels* k : pagewire::cpu::usable_kernels()) names.push_back(k->name);
        return names;
    });
    m.attr("max_width") = pagewire::cpu::kMaxWidth;
    m.def("read", [](uintptr_t data, int64_t count, const Kernels& kernels, int num_threads) {
        py::gil_scoped_release release;
        return pagewire::cpu::read(reinterpret_cast<const float*>(data), count, kernels, num_threads);
    });
    m.def("decode", &decode);
    m.def("prefill", &prefill);
    m.def("append_kv", &append_kv);
    m.def("pack_kv", &pack_kv);
    m.def("unpack_kv", &unpack_kv);
    m.def("merge_states", &merge_states);
}
