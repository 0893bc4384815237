// pagewire._host: what a repeated call would otherwise pay for in Python, see memo.py and kernels/again.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/kind.h"
#include "bindings/views.h"
#include "host/launches.h"

namespace pagewire::bindings {
namespace {

using host::Driver;
using host::Launch;
using host::Matrix;
using host::Place;

// (parameter, place, bytes behind it); place: a tensor of the call, or -1: its scratch memory.
using PlaceOf = std::tuple<size_t, int, uint64_t>;

constexpr size_t kMostTensors = 15;
constexpr uint64_t kAlign = 16;  // bytes, for which Triton compiles

// Checked with the launch that has it.
Matrix matrix_of(size_t parameter, size_t place, int type, std::pair<uint64_t, uint64_t> shape, uint64_t row_bytes,
                 std::pair<uint32_t, uint32_t> box, uint32_t swizzle_bytes) {
    return {.parameter = parameter,
            .address = place,
            .type = type,
            .rows = shape.first,
            .columns = shape.second,
            .row_bytes = row_bytes,
            .box_rows = box.first,
            .box_columns = box.second,
            .swizzle_bytes = swizzle_bytes};
}

Launch launch_of(std::string name, uintptr_t function, const std::array<unsigned, 3>& grid, unsigned num_threads,
                 unsigned shared_bytes, std::vector<uint64_t> values, const std::vector<PlaceOf>& places,
                 std::vector<Matrix> matrices) {
    Launch launch{.name = std::move(name),
                  .function = reinterpret_cast<void*>(function),
                  .grid = {grid[0], grid[1], grid[2]},
                  .num_threads = num_threads,
                  .shared_bytes = shared_bytes,
                  .parameters = std::move(values),
                  .places = {},
                  .matrices = std::move(matrices)};
    for (const Matrix& m : launch.matrices) {
        if (m.parameter >= launch.parameters.size() || m.address >= kMostTensors) {
            throw std::out_of_range("pagewire: a matrix beyond the parameters or tensors of " + launch.name);
        }
    }
    for (const auto& [parameter, place, offset] : places) {
        const size_t address = place < 0 ? kMostTensors : static_cast<size_t>(place);
        if (parameter >= launch.parameters.size() || place >= static_cast<int>(kMostTensors)) {
            throw std::out_of_range("pagewire: a place beyond the parameters or tensors of " + launch.name);
        }
        launch.places.push_back({parameter, address, offset});
    }
    return launch;
}

class Launches {
  public:
    // aligned: the tensors that kernels were compiled for on 16-byte boundaries.
    Launches(std::vector<Launch> launches, const std::vector<size_t>& aligned) : launches_(std::move(launches)) {
        for (const Launch& launch : launches_) {
            for (const Place& place : launch.places) used_.push_back(place.address);
            for (const Matrix& matrix : launch.matrices) used_.push_back(matrix.address);
        }
        std::sort(used_.begin(), used_.end());
        used_.erase(std::unique(used_.begin(), used_.end()), used_.end());
        for (const size_t tensor : aligned) aligned_.at(tensor) = kAlign - 1;
    }

    // False: nothing was started, since an address is on another boundary or nobody has set the driver up.
    bool start(const py::tuple& tensors, py::handle scratch, uintptr_t stream) const {
        static const Name kDataPtr("data_ptr");
        const Driver* driver = Driver::loaded();
        if (driver == nullptr || !driver->has_context()) return false;
        std::array<uint64_t, kMostTensors + 1> addresses;
        uint64_t off_boundary = 0;
        for (const size_t i : used_) {
            if (i < kMostTensors && i >= tensors.size()) throw std::out_of_range("pagewire: fewer tensors than places");
            const py::handle tensor = i == kMostTensors ? scratch : PyTuple_GET_ITEM(tensors.ptr(), i);
            addresses[i] = kDataPtr.call(tensor).cast<uintptr_t>();
            off_boundary |= addresses[i] & aligned_[i];
        }
        if (off_boundary != 0) return false;
        py::gil_scoped_release release;  // the driver waits where too many launches are under way
        host::start(*driver, launches_, addresses.data(), reinterpret_cast<void*>(stream));
        return true;
    }

  private:
    std::vector<Launch> launches_;
    std::vector<size_t> used_;                             // of the addresses, the last one the scratch memory's
    std::array<uint64_t, kMostTensors + 1> aligned_ = {};  // bits that an address must not have
};

}  // namespace
}  // namespace pagewire::bindings

PYBIND11_MODULE(_host, m) {
    using namespace pagewire::bindings;
    py::class_<Looker>(m, "Looker")
        .def(py::init<py::type, const py::capsule&>())
        .def("kind", &Looker::kind)
        .def("addresses", &Looker::addresses);
    py::class_<Launch>(m, "Launch")
        .def(py::init(&launch_of), py::kw_only(), py::arg("name"), py::arg("function"), py::arg("grid"),
             py::arg("num_threads"), py::arg("shared_bytes"), py::arg("values"), py::arg("places"),
             py::arg("matrices"));
    py::class_<Matrix>(m, "Matrix")
        .def(py::init(&matrix_of), py::kw_only(), py::arg("parameter"), py::arg("place"), py::arg("type"),
             py::arg("shape"), py::arg("row_bytes"), py::arg("box"), py::arg("swizzle_bytes"));
    py::class_<Launches>(m, "Launches")
        .def(py::init<std::vector<Launch>, const std::vector<size_t>&>())
        .def("start", &Launches::start);
}
