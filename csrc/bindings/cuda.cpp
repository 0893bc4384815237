// pagewire._cuda (and, built for emulation, pagewire._cuda_emulated): raw pointers, strides and a
// stream in, launches out.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/merge.h"
#include "cuda/move.h"

#if defined(PAGEWIRE_EMULATE)
#include "emulation/runtime.h"
#else
#include "cuda/runtime_gpu.h"
#endif

namespace py = pybind11;

namespace pagewire {
namespace {

// Reads a tuple field by field, in the order backends/cuda.py writes them.
class Fields {
  public:
    explicit Fields(const py::handle& tuple) : tuple_(py::reinterpret_borrow<py::tuple>(tuple)) {}
    ~Fields() noexcept(false) {
        if (next_ != tuple_.size() && std::uncaught_exceptions() == 0) {
            throw std::logic_error("pagewire bindings: " + std::to_string(tuple_.size()) + " fields given, " +
                                   std::to_string(next_) + " read");
        }
    }
    Fields(const Fields&) = delete;

    int64_t integer() { return next().cast<int64_t>(); }
    int small() { return next().cast<int>(); }
    bool flag() { return next().cast<bool>(); }
    float number() { return next().cast<float>(); }
    DType dtype() { return static_cast<DType>(small()); }
    py::tuple tuple() { return next().cast<py::tuple>(); }
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
    }

  private:
    py::handle next() { return tuple_[next_++]; }
    py::tuple tuple_;
    size_t next_ = 0;
};

// ------------------------------------------------------------------------------------ movement

MoveSide read_side(const py::handle& tuple) {
    Fields f(tuple);
    MoveSide s{};
    s.dtype = f.dtype();
    s.stride_page = f.integer();
    s.stride_token = f.integer();
    s.stride_head = f.integer();
    s.scale = static_cast<ScaleUse>(f.small());
    s.scale_value = f.number();
    s.scale_stride_page = f.integer();
    s.scale_stride_token = f.integer();
    s.scale_stride_head = f.integer();
    return s;
}

void move_op(ErrorKind kind, bool source_has_slots, const py::tuple& parts, const py::tuple& pointers,
             const py::tuple& slots) {
    MoveRequest r{};
    for (const py::handle& part : parts) {
        Fields f(part);
        const int width = f.small();
        const MoveSide source = read_side(f.tuple()), target = read_side(f.tuple());
        r.parts.push_back({width, source, target});
    }
    for (const py::handle& at : pointers) {
        Fields f(at);
        MovePointers m{};
        m.source = f.pointer<const char>();
        m.target = f.pointer<char>();
        m.source_scale = f.pointer<const char>();
        m.target_scale = f.pointer<char>();
        r.pointers.push_back(m);
    }
    r.source_has_slots = source_has_slots;
    r.error_kind = kind;
    {
        Fields f(slots);
        r.slots = f.pointer<const void>();
        r.slots_int64 = f.flag();
        r.slot_stride = f.integer();
        r.num_slots = f.integer();
        r.page_size = f.integer();
        r.num_tokens = f.integer();
        r.num_heads = f.integer();
        r.error_word = f.pointer<int64_t>();
        r.device = f.small();
        r.stream = static_cast<uintptr_t>(f.integer());
    }
    py::gil_scoped_release release;
    move(r);
}

// --------------------------------------------------------------------------------------- merge

MergeStates read_states(const py::handle& tuple) {
    Fields f(tuple);
    MergeStates s{};
    s.out = f.pointer<const char>();
    s.stride_state = f.integer();
    s.stride_row = f.integer();
    s.stride_head = f.integer();
    s.lse = f.pointer<const float>();
    s.lse_stride_state = f.integer();
    s.lse_stride_row = f.integer();
    s.lse_stride_head = f.integer();
    return s;
}

void merge_op(const py::tuple& first, const py::tuple& rest, int num_states, const py::tuple& result, int device,
              uintptr_t stream) {
    MergeRequest r{};
    r.first = read_states(first);
    r.rest = read_states(rest);
    r.num_states = num_states;
    {
        Fields f(result);
        r.dtype = f.dtype();
        r.out_dtype = f.dtype();
        r.num_rows = f.integer();
        r.num_heads = f.integer();
        r.width = f.integer();
        r.out = f.pointer<char>();
        r.stride_row = f.integer();
        r.stride_head = f.integer();
        r.lse = f.pointer<float>();
        r.lse_stride_row = f.integer();
        r.lse_stride_head = f.integer();
    }
    r.device = device;
    r.stream = stream;
    py::gil_scoped_release release;
    merge(r);
}

// ----------------------------------------------------------------------------------- attention

AttentionCache read_cache(const py::handle& tuple) {
    Fields f(tuple);
    AttentionCache c{};
    c.data = f.pointer<const char>();
    c.stride_page = f.integer();
    c.stride_token = f.integer();
    c.stride_head = f.integer();
    c.width = f.small();
    c.aligned = ((reinterpret_cast<intptr_t>(c.data) | c.stride_page | c.stride_token | c.stride_head) & 15) == 0;
    Fields s(f.tuple());
    c.scale.form = static_cast<ScaleForm>(s.small());
    c.scale.value = s.number();
    c.scale.data = s.pointer<const float>();
    c.scale.stride_request = s.integer();
    c.scale.stride_page = s.integer();
    c.scale.stride_token = s.integer();
    c.scale.stride_head = s.integer();
    return c;
}

// `allocate(partial_floats, num_counters)` gives three pointers: fp32 space, and int32 counters and
// one more that are zero.
void attention_op(const py::tuple& tensors, const py::tuple& k, const py::tuple& v, const py::tuple& sizes,
                  const py::tuple& modifiers, const py::function& allocate) {
    AttentionRequest r{};
    AttentionPlan& p = r.plan;
    p.k = read_cache(k);
    p.v = read_cache(v);
    {
        Fields f(tensors);
        p.q = f.pointer<const char>();
        p.q_stride_row = f.integer();
        p.q_stride_head = f.integer();
        p.page_table = f.pointer<const int32_t>();
        p.table_stride = f.integer();
        p.seq_lens = f.pointer<const int32_t>();
        p.seq_lens_stride = f.integer();
        p.cu_seqlens_q = f.pointer<const int32_t>();
        p.out = f.pointer<char>();
        p.out_stride_row = f.integer();
        p.out_stride_head = f.integer();
        p.lse = f.pointer<float>();
        p.lse_stride_row = f.integer();
        p.lse_stride_head = f.integer();
        p.alibi_slopes = f.pointer<const float>();
        p.alibi_stride_request = f.integer();
        p.alibi_stride_head = f.integer();
        p.sinks = f.pointer<const float>();
        p.sinks_stride = f.integer();
        p.error_word = f.pointer<int64_t>();
    }
    {
        Fields f(sizes);
        r.q_dtype = f.dtype();
        r.kv_dtype = f.dtype();
        p.out_float32 = f.flag();
        p.batch_size = f.small();
        p.num_tokens = f.small();
        p.num_kv_heads = f.small();
        p.group_size = f.small();
        const int64_t strides = (p.q_stride_row | p.q_stride_head) * item_size(r.q_dtype);
        p.q_aligned = ((reinterpret_cast<intptr_t>(p.q) | strides) & 15) == 0;
        p.num_pages = f.small();
        p.page_size = f.small();
        p.max_pages_per_seq = f.small();
        p.max_q_len = f.small();
        r.device = f.small();
        r.stream = static_cast<uintptr_t>(f.integer());
    }
    {
        Fields f(modifiers);
        p.softmax_scale = f.number();
        p.softcap = f.number();
        p.causal = f.flag();
        p.window_left = f.small();
        p.window_right = f.small();
        p.split_size = f.small();
    }
    const AttentionSpace space = attention_space(r);
    Fields f(allocate(space.partial_floats, space.num_counters).cast<py::tuple>());
    p.partial = f.pointer<float>();
    p.counters = f.pointer<int>();
    p.blocks_done = f.pointer<int>();
    py::gil_scoped_release release;
    attention(r);
}

}  // namespace
}  // namespace pagewire

#if defined(PAGEWIRE_EMULATE)
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
    using namespace pagewire;
    m.def("append_kv", [](const py::tuple& parts, const py::tuple& pointers, const py::tuple& slots) {
        move_op(ErrorKind::kAppendSlot, /*source_has_slots=*/false, parts, pointers, slots);
    });
    m.def("pack_kv", [](const py::tuple& parts, const py::tuple& pointers, const py::tuple& slots) {
        move_op(ErrorKind::kPackSlot, /*source_has_slots=*/true, parts, pointers, slots);
    });
    m.def("unpack_kv", [](const py::tuple& parts, const py::tuple& pointers, const py::tuple& slots) {
        move_op(ErrorKind::kUnpackSlot, /*source_has_slots=*/false, parts, pointers, slots);
    });
    m.def("merge_states", merge_op);
    m.def("attention", attention_op);
#if defined(PAGEWIRE_EMULATE)
    m.def("last_launch", [] {
        const emulation::Block::Launched& l = emulation::Block::running().launched();
        py::dict d;
        d["kernel"] = l.kernel;
        d["grid"] = py::make_tuple(l.grid.x, l.grid.y);
        d["num_threads"] = l.num_threads;
        d["shared_bytes"] = l.shared_bytes;
        d["copied_bytes"] = l.copied_bytes;
        d["evict_first_bytes"] = l.evict_first_bytes;
        return d;
    });
    // `call(blocks that are done)` between the blocks of every launch; None: no longer
    m.def("after_each_block", [](const py::object& call) {
        std::function<void(uint64_t)> function;
        if (!call.is_none()) {
            function = [call](uint64_t done) {
                py::gil_scoped_acquire hold;
                call(done);
            };
        }
        emulation::Block::running().after_each_block(std::move(function));
    });
#else
    m.def("capture_id", &runtime::capture_of);
    m.def("driver_version", &runtime::driver_version);
    m.def("runtime_version", &runtime::runtime_version);
#endif
}
