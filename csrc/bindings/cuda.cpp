// pagewire._cuda (and, built for emulation, pagewire._cuda_emulated): tensors and a stream in, launches out.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/params.h"
#include "cuda/attention/attention.h"
#include "cuda/merge/merge.h"
#include "cuda/move/move.h"

#if defined(PAGEWIRE_EMULATE)
#include "emulation/runtime.h"
#else
#include "cuda/runtime_gpu.h"
#endif

namespace pagewire::bindings {
namespace {

// call: a Call of backends/cuda.py.
Call call_of(py::handle call) {
    static const Name kDevice("device");
    static const Name kStream("stream");
    static const Name kErrorWord("error_word");
    return {.device = kDevice.of(call).cast<int>(),
            .stream = kStream.of(call).cast<uintptr_t>(),
            .error_word = Tensor(kErrorWord.of(call)).as<int64_t>()};
}

// `allocate(partial_floats, num_counters)` gives a Workspace of backends/cuda.py.
void attention(const AttentionParams& p, const Call& call, const py::function& allocate) {
    static const Name kPartial("partial");
    static const Name kOfItems("of_items");
    static const Name kOfBlocks("of_blocks");
    const AttentionSpace space = attention_space(p, call);
    const py::object given = allocate(space.partial_floats, space.num_counters);
    const AttentionWorkspace workspace{.partial = Tensor(kPartial.of(given)).as<float>(),
                                       .counters = Tensor(kOfItems.of(given)).as<int>(),
                                       .blocks_done = Tensor(kOfBlocks.of(given)).as<int>()};
    py::gil_scoped_release release;
    pagewire::attention(p, workspace, call);
}

void decode(py::handle q, py::handle k_cache, py::handle v_cache, py::handle page_table, py::handle seq_lens,
            py::handle modifiers, py::handle out, py::handle lse, py::handle call, const py::function& allocate) {
    attention(attention_params("decode", q, k_cache, v_cache, page_table, seq_lens, py::none(), modifiers, out, lse),
              call_of(call), allocate);
}

void prefill(py::handle q, py::handle k_cache, py::handle v_cache, py::handle page_table, py::handle seq_lens,
             py::handle cu_seqlens_q, py::handle modifiers, py::handle out, py::handle lse, py::handle call,
             const py::function& allocate) {
    attention(attention_params("prefill", q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse),
              call_of(call), allocate);
}

void move(py::handle movement, py::handle call) {
    const Movement m = movement_of(movement);
    const Call where = call_of(call);
    py::gil_scoped_release release;
    pagewire::move(m.params, where);
}

void run_merge(const MergeParams& p, const Call& call) {
    py::gil_scoped_release release;
    pagewire::merge(p, call);
}

void merge_state(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle out, py::handle lse,
                 py::handle call) {
    run_merge(merge_params(state_view(out_a, lse_a), state_view(out_b, lse_b), out, lse), call_of(call));
}

void merge_states(py::handle outs, py::handle lses, py::handle out, py::handle lse, py::handle call) {
    run_merge(merge_params(outs, lses, out, lse), call_of(call));
}

}  // namespace
}  // namespace pagewire::bindings

#if defined(PAGEWIRE_EMULATE)
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
    using namespace pagewire;
    m.def("decode", &bindings::decode);
    m.def("prefill", &bindings::prefill);
    m.def("move", &bindings::move);
    m.def("merge_state", &bindings::merge_state);
    m.def("merge_states", &bindings::merge_states);
#if defined(PAGEWIRE_EMULATE)
    m.def("last_launch", [] {
        const emulation::Block::Launched& l = emulation::Block::running().launched();
        pybind11::dict d;
        d["kernel"] = l.kernel;
        d["grid"] = pybind11::make_tuple(l.grid.x, l.grid.y);
        d["num_threads"] = l.num_threads;
        d["shared_bytes"] = l.shared_bytes;
        d["blocks_that_fit"] = runtime::blocks_that_fit(l.num_threads, l.shared_bytes);
        d["copied_bytes"] = l.copied_bytes;
        d["evict_first_bytes"] = l.evict_first_bytes;
        return d;
    });
    // `call(blocks that are done)` between the blocks of every launch; None: no longer
    m.def("after_each_block", [](const pybind11::object& call) {
        std::function<void(uint64_t)> function;
        if (!call.is_none()) {
            function = [call](uint64_t done) {
                pybind11::gil_scoped_acquire hold;
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
