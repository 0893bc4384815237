// Launching without <<<>>>: the same call runs a kernel on a GPU or under the emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device.h"

#if !defined(PAGEWIRE_EMULATE)
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>
#else
#include <cstdlib>
#endif

namespace pagewire {

struct LaunchConfig {
    const char* name;  // of the kernel, for messages
    uint32_t grid_x, grid_y;
    int num_threads;
    size_t shared_bytes;
    uintptr_t stream;
};

#if defined(PAGEWIRE_EMULATE)

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& c, const Arguments&... arguments) {
    emulation::Block::running().run_grid(c.name, {c.grid_x, c.grid_y, 1}, c.num_threads,
                                         c.shared_bytes, [&] { kernel(arguments...); });
}

inline int num_multiprocessors() {
    const char* count = std::getenv("PAGEWIRE_EMULATION_SMS");
    return count ? std::atoi(count) : 4;
}

template <class Kernel>
int blocks_per_multiprocessor(Kernel, int, size_t) {
    return 1;
}

struct UseDevice {
    explicit UseDevice(int) {}
};

#else

inline void check_cuda(cudaError_t error, const char* doing) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("pagewire: ") + doing + ": " +
                                 cudaGetErrorString(error));
    }
}

// Makes `device` current for this thread while in scope.
class UseDevice {
  public:
    explicit UseDevice(int device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device != previous_) {
            check_cuda(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }
    ~UseDevice() {
        if (changed_) cudaSetDevice(previous_);
    }
    UseDevice(const UseDevice&) = delete;
    UseDevice& operator=(const UseDevice&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

inline int current_device() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    return device;
}

inline int num_multiprocessors() {
    static std::mutex mutex;
    static std::map<int, int> known;
    std::lock_guard<std::mutex> lock(mutex);
    int& count = known[current_device()];
    if (count == 0) {
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
                   "cudaDeviceGetAttribute");
    }
    return count;
}

// Blocks of this kernel that fit on one multiprocessor; also raises the kernel's limit of shared
// memory to `shared_bytes`, so call it before the first launch. Asked once per kernel, size and
// device.
template <class Kernel>
int blocks_per_multiprocessor(Kernel kernel, int num_threads, size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::pair<int, std::pair<const void*, size_t> >, int> known;
    const void* function = reinterpret_cast<const void*>(kernel);
    std::lock_guard<std::mutex> lock(mutex);
    int& blocks = known[{current_device(), {function, shared_bytes}}];
    if (blocks == 0) {
        check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
        check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, num_threads,
                                                                 shared_bytes),
                   "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        if (blocks == 0) {
            throw std::runtime_error("pagewire: a kernel with " + std::to_string(shared_bytes) +
                                     " bytes of shared memory does not fit on this device");
        }
    }
    return blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& c, const Arguments&... arguments) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(c.grid_x, c.grid_y, 1),
                                dim3(static_cast<unsigned>(c.num_threads), 1, 1), pointers,
                                c.shared_bytes, reinterpret_cast<cudaStream_t>(c.stream)),
               c.name);
}

#endif

}  // namespace pagewire
