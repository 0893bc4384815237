// How torch shows a tensor to C++ without being linked: DLPack's exchange API, version 1
// (https://dmlc.github.io/dlpack/latest/c_api.html), from the attribute __dlpack_c_exchange_api__ of torch.Tensor.
#pragma once

#include <cstdint>

namespace pagewire::host {

struct DLDevice {
    int32_t type, id;
};

constexpr uint8_t kUnsigned = 1;  // code; 0: integers with a sign

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ExchangeApi {
    static constexpr const char* kCapsule = "dlpack_exchange_api";
    static constexpr uint32_t kMajor = 1;

    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*from_object)(void* object, DLTensor* found);  // a view, valid while the object lives; -1: a Python error
    void* current_stream;
};

}  // namespace pagewire::host
