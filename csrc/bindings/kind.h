// The kind of a call, see memo.py: what its checks may depend on, as bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/views.h"
#include "host/exchange.h"

namespace pagewire::bindings {

// Values as bytes: two are equal if their bytes are, and no value's bytes begin another's.
class Kind {
  public:
    explicit Kind(PyTypeObject* tensor, const host::ExchangeApi& api) : tensor_(tensor), api_(api) {
        bytes_.reserve(512);
    }

    // Whether all that there is to say of it could be said.
    bool add(PyObject* value, bool may_be_tensor) {
        if (value == Py_None) return tag('n');
        if (value == Py_True) return tag('t');
        if (value == Py_False) return tag('f');
        if (Py_TYPE(value) == tensor_) return may_be_tensor && add_tensor(value);
        if (PyFloat_CheckExact(value)) return tag('d') && append(PyFloat_AS_DOUBLE(value));
        if (PyLong_CheckExact(value)) return add_integer(value);
        if (PyUnicode_CheckExact(value)) return add_text(value);
        return false;
    }

    py::bytes bytes() const { return {bytes_.data(), bytes_.size()}; }

  private:
    template <class T>
    bool append(const T& value) {
        bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
        return true;
    }
    bool append(const int64_t* values, int count) {
        bytes_.append(reinterpret_cast<const char*>(values), sizeof *values * static_cast<size_t>(count));
        return true;
    }
    bool tag(char what) {
        bytes_.push_back(what);
        return true;
    }

    bool add_integer(PyObject* value) {
        int overflow = 0;
        const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
        return overflow == 0 && tag('i') && append(number);
    }

    bool add_text(PyObject* value) {
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(value, &size);
        if (text == nullptr) {
            PyErr_Clear();
            return false;
        }
        tag('s');
        append(size);
        bytes_.append(text, static_cast<size_t>(size));
        return true;
    }

    bool add_tensor(PyObject* value) {
        host::DLTensor found{};
        if (api_.from_object(value, &found) != 0) {  // a layout without strides, a device without memory
            PyErr_Clear();
            return false;
        }
        tag('T');
        append(found.ndim);
        append(found.device);
        append(found.dtype);
        if (found.dtype.bits == 8 && found.dtype.code <= host::kUnsigned) {  // torch.int4 is shown as int8, and so on
            static const Name kDtype("dtype");
            append(kDtype.of(value).ptr());
        }
        return append(found.shape, found.ndim) && append(found.strides, found.ndim);
    }

    PyTypeObject* tensor_;
    const host::ExchangeApi& api_;
    std::string bytes_;
};

// Looks at tensors of exactly this type, through its exchange API.
class Looker {
  public:
    Looker(py::type tensor, const py::capsule& api) : tensor_(std::move(tensor)), api_(newest_known(api)) {}

    // Of mixed (tensors and numbers) and numbers; None: there is more to them than can be said.
    py::object kind(const py::str& op, const py::tuple& mixed, const py::tuple& numbers) const {
        Kind kind(reinterpret_cast<PyTypeObject*>(tensor_.ptr()), *api_);
        bool all = kind.add(op.ptr(), false);
        for (size_t i = 0; all && i < mixed.size(); ++i) all = kind.add(PyTuple_GET_ITEM(mixed.ptr(), i), true);
        for (size_t i = 0; all && i < numbers.size(); ++i) all = kind.add(PyTuple_GET_ITEM(numbers.ptr(), i), false);
        return all ? py::object(kind.bytes()) : py::none();
    }

    // Where they lie, as bytes.
    py::bytes addresses(const py::tuple& tensors) const {
        const size_t count = tensors.size();
        py::bytes found(nullptr, sizeof(uint64_t) * count);
        auto* to = reinterpret_cast<uint64_t*>(PyBytes_AS_STRING(found.ptr()));
        for (size_t i = 0; i < count; ++i) {
            host::DLTensor tensor{};
            if (api_->from_object(PyTuple_GET_ITEM(tensors.ptr(), i), &tensor) != 0) throw py::error_already_set();
            to[i] = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
        }
        return found;
    }

  private:
    static const host::ExchangeApi* newest_known(const py::capsule& capsule) {
        const void* found = PyCapsule_GetPointer(capsule.ptr(), host::ExchangeApi::kCapsule);
        if (found == nullptr) throw py::error_already_set();
        const auto* api = static_cast<const host::ExchangeApi*>(found);
        while (api != nullptr && api->major > host::ExchangeApi::kMajor) api = api->previous;
        if (api == nullptr || api->major != host::ExchangeApi::kMajor || api->from_object == nullptr) {
            throw std::invalid_argument("pagewire: expected version 1 of DLPack's exchange API, with views");
        }
        return api;
    }

    py::type tensor_;
    const host::ExchangeApi* api_;
};

}  // namespace pagewire::bindings
