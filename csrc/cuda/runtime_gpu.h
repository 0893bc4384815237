// What the host asks of the CUDA runtime. Its twin, emulation/runtime.h, refuses what a device would refuse.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace pagewire::runtime {

inline void check(cudaError_t error, const std::string& doing) {
    if (error != cudaSuccess) {
        throw std::runtime_error("pagewire: " + doing + ": " + cudaGetErrorString(error));
    }
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }
// Back to the caller's: called while an exception may be under way.
inline void leave_device(int previous) noexcept { cudaSetDevice(previous); }

// Asked once per device.
inline int attribute(cudaDeviceAttr which) {
    static std::mutex mutex;
    static std::map<std::pair<int, cudaDeviceAttr>, int> known;
    std::lock_guard<std::mutex> lock(mutex);
    const auto [at, is_new] = known.try_emplace({current_device(), which}, 0);
    if (is_new) {
        check(cudaDeviceGetAttribute(&at->second, which, at->first.first), "cudaDeviceGetAttribute");
    }
    return at->second;
}

inline int num_multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Bytes of shared memory a block can have.
inline size_t shared_memory_of_a_block() {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

inline size_t shared_memory_of_a_multiprocessor() {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
}

// 90 for sm_90.
inline int architecture() {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

// To all that a block can have beside what the kernel declares.
template <class... Parameters>
void raise_shared_memory_limit(void (*kernel)(Parameters...)) {
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes of{};
    check(cudaFuncGetAttributes(&of, function), "cudaFuncGetAttributes");
    const size_t bytes = shared_memory_of_a_block() - of.sharedSizeBytes;
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
          "cudaFuncSetAttribute(MaxDynamicSharedMemorySize, " + std::to_string(bytes) + ")");
}

template <class... Parameters>
int blocks_of_a_multiprocessor(void (*kernel)(Parameters...), int num_threads, size_t shared_bytes) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), num_threads,
                                                        shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
}

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), const char* name, int64_t grid_x, int64_t grid_y, int num_threads,
           size_t shared_bytes, uintptr_t stream, const Arguments&... arguments) {
    // what does not fit into dim3 would be cut off
    if (grid_x > INT32_MAX || grid_y > UINT16_MAX) check(cudaErrorInvalidConfiguration, name);
    const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1);
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(num_threads), 1, 1),
                           pointers, shared_bytes, reinterpret_cast<cudaStream_t>(stream)),
          std::string(name) + " of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) + " blocks, " +
              std::to_string(shared_bytes) + " bytes of shared memory");
}

// A function of the driver as CUDA 12.0 has it, without linking libcuda.
template <class Function>
Function driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
    check(error, std::string("looking for ") + name);
    if (found != cudaDriverEntryPointSuccess || !function) {
        throw std::runtime_error(std::string("pagewire: this driver has no ") + name);
    }
    return reinterpret_cast<Function>(function);
}

// 0 outside a capture, else a number no other capture has. Asks the stream, whatever device is current.
inline uint64_t capture_of(uintptr_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    if (cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id) != cudaSuccess ||
        status != cudaStreamCaptureStatusActive) {
        return 0;
    }
    return id;
}

// 1000 * major + 10 * minor; 0: no driver.
inline int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
inline int runtime_version() { return CUDART_VERSION; }

}  // namespace pagewire::runtime
