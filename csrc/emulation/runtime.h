// The host's side of the emulation: a device with the limits of a real one, on which everything is
// refused that the CUDA runtime would refuse. Twin of cuda/runtime_gpu.h.
//
// PAGEWIRE_EMULATION_ARCH: 80, 86, 87, 89, 90 (default), 100, 103, 110, 120 or 121;
// PAGEWIRE_EMULATION_SMS: its multiprocessors (default 4). Read at every call, so that a test may
// change its device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/block.h"

namespace pagewire::runtime {

struct Limits {
    size_t shared_of_a_block, shared_of_a_multiprocessor;
    int threads_of_a_multiprocessor, blocks_of_a_multiprocessor;
};

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr size_t kSharedWithoutAsking = 48 << 10, kSharedOfTheSystem = 1 << 10, kSharedUnit = 128;
constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 0xffff;
constexpr size_t kMaxParameterBytes = 32764;  // from sm_70 and CUDA 12.1 on

int architecture();
Limits limits_of(int arch);  // throws emulation::Fault for one it does not know

// A device is its architecture: whoever remembers something of a device asks anew for another one.
inline int current_device() { return architecture(); }
inline void use_device(int) {}
inline void leave_device(int) noexcept {}
int num_multiprocessors();
inline size_t shared_memory_of_a_block() { return limits_of(architecture()).shared_of_a_block; }

inline size_t shared_memory_of_a_multiprocessor() { return limits_of(architecture()).shared_of_a_multiprocessor; }

void raise_shared_memory_limit(const void* kernel);  // kernels here declare none of their own
// By threads and shared memory; what registers allow, the compiler's report says.
int blocks_that_fit(int num_threads, size_t shared_bytes);
// One where a block fits at all: more would only make the emulation slower.
inline int blocks_of_a_multiprocessor(int num_threads, size_t shared_bytes) {
    return blocks_that_fit(num_threads, shared_bytes) > 0 ? 1 : 0;
}
// Throws emulation::Fault where a device would answer with an error.
void check_launch(const void* kernel, const char* name, int64_t grid_x, int64_t grid_y, int num_threads,
                  size_t shared_bytes, size_t parameter_bytes);

template <class... Parameters>
void raise_shared_memory_limit(void (*kernel)(Parameters...)) {
    raise_shared_memory_limit(reinterpret_cast<const void*>(kernel));
}

template <class... Parameters>
int blocks_of_a_multiprocessor(void (*)(Parameters...), int num_threads, size_t shared_bytes) {
    return blocks_of_a_multiprocessor(num_threads, shared_bytes);
}

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), const char* name, int64_t grid_x, int64_t grid_y, int num_threads,
           size_t shared_bytes, uintptr_t, const Arguments&... arguments) {
    check_launch(reinterpret_cast<const void*>(kernel), name, grid_x, grid_y, num_threads, shared_bytes,
                 (sizeof(Parameters) + ... + 0));
    emulation::Block::running().run_grid(name, architecture(),
                                         {static_cast<uint32_t>(grid_x), static_cast<uint32_t>(grid_y), 1}, num_threads,
                                         shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace pagewire::runtime
