// The tensor memory accelerator: one thread loads a box of a tensor of four dimensions into shared memory, and the bytes
// count for an mbarrier (all of the box's, also those outside the tensor, which are zeros). From sm_90 on.
//
// Dimensions are named innermost first: c0 counts elements that lie side by side. Rows of the box, 32, 64 or 128 bytes,
// follow each other in shared memory; their 16-byte chunks change places by the address, so that ldmatrix finds no bank
// conflict: chunk c of a row lies at c ^ (address / 128 % 8) for rows of 128 bytes. Where the box starts at a multiple
// of 1024 bytes that is c ^ (row % 8), as swizzled_byte() says.
#pragma once

#include "cuda/device/mbarrier.h"

#if defined(PAGEWIRE_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define PW_HAS_TMA 1
#endif

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

using emulation::TensorMap;

inline void load_box(void* shared, const TensorMap* map, int c0, int c1, int c2, int c3, Mbarrier* mbarrier,
                     uint64_t policy, Where where = Where::here()) {
    Block::running().load_box(shared, map, {c0, c1, c2, c3}, mbarrier, where);
    Block::running().note_policy(static_cast<int>(map->box_bytes()), policy == 1);
}
inline void prefetch_map(const TensorMap* map, Where where = Where::here()) {
    Block::running().check_alignment(map, 64, where);
}

}  // namespace pagewire

#else

#include <cuda.h>

namespace pagewire {

using TensorMap = CUtensorMap;  // a kernel's parameter, const and PW_GRID_CONSTANT

// `shared` is aligned to 128 bytes; `policy` is one of copy_async.h's.
PW_DEVICE void load_box(void* shared, const TensorMap* map, int c0, int c1, int c2, int c3, Mbarrier* mbarrier,
                        uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(shared)),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(mbarrier)), "l"(policy)
        : "memory");
}
// Before the first load by it waits for its bytes.
PW_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

}  // namespace pagewire

#endif

namespace pagewire {

// Where the 16 bytes from byte 16 * chunk of a 128-byte row lie in it.
PW_HOST_DEVICE int swizzled_byte(int row, int chunk) { return (chunk ^ row % 8) * 16; }

}  // namespace pagewire
