// What a kernel may ask of the machine: thread coordinates, barriers, warp operations, asynchronous
// copies, tensor core steps, checked shared memory. Two implementations: PTX, and
// (PAGEWIRE_EMULATE) a CPU that checks every access.
//
// Kernels touch shared memory only through these functions: that is what lets the emulation see
// races, uninitialised bytes and copies that have not been waited for.
#pragma once

#include <cstdint>

namespace pagewire {

struct alignas(16) Vec16 {
    uint32_t x[4];
};

struct alignas(8) Vec8 {
    uint32_t x[2];
};

}  // namespace pagewire

#if defined(PAGEWIRE_EMULATE)
#include "emulation/device.h"
#else
#include "cuda/device_gpu.h"
#endif
