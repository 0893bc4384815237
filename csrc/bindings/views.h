// Torch tensors as views: what a tensor says of itself is asked by name, so that no torch is linked.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>

#include "pagewire/views.h"

namespace pagewire::bindings {

namespace py = pybind11;

// An attribute name, made a Python string once.
class Name {
  public:
    explicit Name(const char* text) : text_(PyUnicode_InternFromString(text)) {}
    py::object of(py::handle object) const { return owned(PyObject_GetAttr(object.ptr(), text_)); }
    py::object call(py::handle object) const { return owned(PyObject_CallMethodNoArgs(object.ptr(), text_)); }

  private:
    static py::object owned(PyObject* found) {
        if (found == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    }
    PyObject* text_;
};

struct Tensor {
    static constexpr int kMaxDims = 4;
    char* data;
    py::object dtype;  // a torch.dtype
    int dims;
    int64_t shape[kMaxDims], stride[kMaxDims];  // in elements

    explicit Tensor(py::handle tensor) {
        static const Name kDataPtr("data_ptr");
        static const Name kDtype("dtype");
        static const Name kShape("shape");
        static const Name kStride("stride");
        data = reinterpret_cast<char*>(kDataPtr.call(tensor).cast<uintptr_t>());
        dtype = kDtype.of(tensor);
        const auto shapes = kShape.of(tensor).cast<py::tuple>();
        const auto strides = kStride.call(tensor).cast<py::tuple>();
        dims = static_cast<int>(shapes.size());
        if (dims > kMaxDims) throw std::invalid_argument("pagewire: expected a tensor of at most 4 dims");
        for (int i = 0; i < dims; ++i) {
            shape[i] = shapes[static_cast<size_t>(i)].cast<int64_t>();
            stride[i] = strides[static_cast<size_t>(i)].cast<int64_t>();
        }
    }

    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
};

// torch's dtype of that name; dtypes are singletons.
inline py::handle torch_dtype(const char* name) {
    return py::object(py::module_::import("torch").attr(name)).release();
}

inline DType dtype_of(const Tensor& t) {
    static const std::array<py::handle, 6> kDtypes = {torch_dtype("float16"),     torch_dtype("bfloat16"),
                                                      torch_dtype("float32"),     torch_dtype("float8_e4m3fn"),
                                                      torch_dtype("float8_e5m2"), torch_dtype("int8")};
    for (size_t i = 0; i < kDtypes.size(); ++i) {
        if (t.dtype.is(kDtypes[i])) return static_cast<DType>(i);
    }
    throw std::invalid_argument("pagewire: no kernel takes " + py::repr(t.dtype).cast<std::string>());
}

// [num_pages, page_size, num_kv_heads, width]
inline CacheView cache_view(py::handle tensor) {
    const Tensor t(tensor);
    return {.data = t.data,
            .dtype = dtype_of(t),
            .num_pages = t.shape[0],
            .page_size = t.shape[1],
            .num_kv_heads = t.shape[2],
            .width = t.shape[3],
            .stride_page = t.stride[0],
            .stride_token = t.stride[1],
            .stride_head = t.stride[2]};
}

// The last three dims: [num_rows, num_heads, width].
inline RowsView rows_view(const Tensor& t) {
    const int i = t.dims - 3;
    return {.data = t.data,
            .dtype = dtype_of(t),
            .num_rows = t.shape[i],
            .num_heads = t.shape[i + 1],
            .width = t.shape[i + 2],
            .stride_row = t.stride[i],
            .stride_head = t.stride[i + 1]};
}

// The last two dims, [rows, heads], or [heads], the same for every row; None: null.
inline MatrixView matrix_view(py::handle tensor) {
    if (tensor.is_none()) return {};
    const Tensor t(tensor);
    return {.data = t.as<float>(),
            .stride_row = t.dims == 1 ? 0 : t.stride[t.dims - 2],
            .stride_head = t.stride[t.dims - 1]};
}

// int32 or int64 [size]; None: of size 0.
inline IndexView index_view(py::handle tensor) {
    static const py::handle kInt64 = torch_dtype("int64");
    if (tensor.is_none()) return {};
    const Tensor t(tensor);
    return {.data = t.data, .is_int64 = t.dtype.is(kInt64), .size = t.shape[0], .stride = t.stride[0]};
}

// int32 [batch_size, max_pages_per_seq]
inline PageTableView page_table_view(py::handle tensor) {
    const Tensor t(tensor);
    return {
        .data = t.as<int32_t>(), .batch_size = t.shape[0], .max_pages_per_seq = t.shape[1], .stride_row = t.stride[0]};
}

// None, a number, or a tensor [], [heads], [batch_size, heads], [num_pages, page_size, heads].
inline ScaleView scale_view(py::handle scale) {
    if (scale.is_none()) return {};
    if (PyFloat_Check(scale.ptr()) || PyLong_Check(scale.ptr()))
        return {.kind = ScaleKind::kNumber, .value = scale.cast<float>()};
    const Tensor t(scale);
    ScaleView s{.kind = static_cast<ScaleKind>(static_cast<int>(ScaleKind::kTensor) + t.dims), .data = t.as<float>()};
    if (t.dims > 0) s.stride_head = t.stride[t.dims - 1];
    if (t.dims == 2) s.stride_batch = t.stride[0];
    if (t.dims == 3) s.stride_page = t.stride[0], s.stride_token = t.stride[1];
    return s;
}

}  // namespace pagewire::bindings
