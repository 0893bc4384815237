// Defines decode_kernel_for; explicit instantiations of it make the kernels.
#pragma once

#include "cuda/attention/decode.h"
#include "cuda/attention/decode_kernels.h"

namespace pagewire {

template <class T, int kWidth, bool kWide, bool kPlain>
DecodeKernel describe_decode_kernel() {
    using S = Shape<T, kWidth, kWide>;
    return {.name = "decode_kernel",
            .kernel = decode_kernel<T, kWidth, kWide, kPlain>,
            .width = kWidth,
            .num_threads = S::kThreads,
            .min_blocks = S::kMinBlocks,
            .tile = S::kTile,
            .group_keys = S::kGroupKeys,
            .least_row_warps = S::kLeastRowWarps,
            .shared_bytes = Shared<S>::bytes};
}

template <class T, int kWidth>
DecodeKernel decode_kernel_for(bool wide, bool plain) {
    if (wide) {
        return plain ? describe_decode_kernel<T, kWidth, true, true>()
                     : describe_decode_kernel<T, kWidth, true, false>();
    }
    return plain ? describe_decode_kernel<T, kWidth, false, true>() : describe_decode_kernel<T, kWidth, false, false>();
}

}  // namespace pagewire
