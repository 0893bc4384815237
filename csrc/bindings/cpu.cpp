// pagewire._cpu: one function per op. Tensors have been checked by the public functions; what would be unsafe in memory
// (page ids, slots, lengths) is checked again inside. The GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/params.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "pagewire/check.h"

namespace pagewire::bindings {
namespace {

using cpu::Kernels;

struct Machine {
    const Kernels& kernels;
    int num_threads;
};

void attention(const AttentionParams& p, const Machine& machine) {
    py::gil_scoped_release release;
    cpu::attention(p, machine.kernels, machine.num_threads);
}

void decode(py::handle q, py::handle k_cache, py::handle v_cache, py::handle page_table, py::handle seq_lens,
            py::handle modifiers, py::handle out, py::handle lse, const Kernels& kernels, int num_threads) {
    attention(attention_params("decode", q, k_cache, v_cache, page_table, seq_lens, py::none(), modifiers, out, lse),
              {kernels, num_threads});
}

void prefill(py::handle q, py::handle k_cache, py::handle v_cache, py::handle page_table, py::handle seq_lens,
             py::handle cu_seqlens_q, py::handle modifiers, py::handle out, py::handle lse, const Kernels& kernels,
             int num_threads) {
    attention(attention_params("prefill", q, k_cache, v_cache, page_table, seq_lens, cu_seqlens_q, modifiers, out, lse),
              {kernels, num_threads});
}

void move(py::handle movement, const Kernels& kernels, int num_threads) {
    const Movement m = movement_of(movement);
    py::gil_scoped_release release;
    cpu::move(m.params, kernels, num_threads);
}

void merge(const MergeParams& p, const Machine& machine) {
    py::gil_scoped_release release;
    cpu::merge_states(p, machine.kernels, machine.num_threads);
}

void merge_state(py::handle out_a, py::handle lse_a, py::handle out_b, py::handle lse_b, py::handle out, py::handle lse,
                 const Kernels& kernels, int num_threads) {
    merge(merge_params(state_view(out_a, lse_a), state_view(out_b, lse_b), out, lse), {kernels, num_threads});
}

void merge_states(py::handle outs, py::handle lses, py::handle out, py::handle lse, const Kernels& kernels,
                  int num_threads) {
    merge(merge_params(outs, lses, out, lse), {kernels, num_threads});
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
    m.def("move", &move);
    m.def("merge_state", &merge_state);
    m.def("merge_states", &merge_states);
}
