// Which kernel takes a problem; each cache type's are compiled in a file of its own.
#pragma once

#include "cuda/attention/plan.h"
#include "pagewire/dtype.h"

namespace pagewire {

struct DecodeKernel {
    const char* name;
    void (*kernel)(AttentionPlan);
    int width, num_threads, min_blocks, tile, group_keys, least_row_warps;
    size_t (*shared_bytes)(int num_stages);
};

// Of a cache of T and rows padded to kWidth elements. wide: 17 to 64 packed rows; plain: neither soft cap nor
// ALiBi, and all of kWidth is used.
template <class T, int kWidth>
DecodeKernel decode_kernel_for(bool wide, bool plain);

}  // namespace pagewire
