// What a source is written in: the words before a function and a loop, and vectors that move at once. Every header of
// this folder has one idea of the machine, in PTX and (PAGEWIRE_EMULATE) on a CPU that checks every access.
//
// Kernels touch shared memory only through these functions: that is what lets the emulation see races, uninitialised
// bytes and copies that have not been waited for.
#pragma once

#include <cstdint>

#if defined(PAGEWIRE_EMULATE)

#include "emulation/block.h"

#define PW_DEVICE inline
#define PW_HOST_DEVICE inline
#define PW_KERNEL(threads, min_blocks_per_sm)
#define PW_GRID_CONSTANT
#define PW_UNROLL
#define PW_NO_UNROLL
#define PW_UNROLL_BY(n)

namespace pagewire {
using emulation::Block;
using emulation::Where;
}  // namespace pagewire

#else

#define PW_DEVICE __device__ __forceinline__
#define PW_HOST_DEVICE __host__ __device__ __forceinline__
#define PW_KERNEL(threads, min_blocks_per_sm) __global__ __launch_bounds__(threads, min_blocks_per_sm)
#define PW_GRID_CONSTANT __grid_constant__
#define PW_UNROLL _Pragma("unroll")
#define PW_NO_UNROLL _Pragma("unroll 1")
#define PW_PRAGMA(x) _Pragma(#x)
#define PW_UNROLL_BY(n) PW_PRAGMA(unroll n)

#endif

namespace pagewire {

// A value the compiler has to keep: what it would work out again in every turn of a loop.
template <class T>
PW_DEVICE T keep(T x) {
#if !defined(PAGEWIRE_EMULATE)
    if constexpr (sizeof(T) == 8) {
        asm volatile("" : "+l"(x));
    } else {
        asm volatile("" : "+r"(x));
    }
#endif
    return x;
}

struct alignas(16) Vec16 {
    uint32_t x[4];
};

struct alignas(8) Vec8 {
    uint32_t x[2];
};

}  // namespace pagewire
