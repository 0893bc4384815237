// Defines what decode_kernels.h declares; explicit instantiations of it make the kernels.
#pragma once

#include "cuda/attention/decode.h"
#include "cuda/attention/decode_kernels.h"
#include "cuda/attention/decode_sm90.h"

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
            .rows = 16,
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

template <class T, int kWidth, int kRows>
DecodeSm90Kernel describe_decode_sm90_kernel() {
    if constexpr (!kFitsSm90<T, kWidth, kRows>) {
        return {};
    } else {
        using S = ShapeSm90<T, kWidth, kRows>;
        return {.name = "decode_sm90_kernel",
                .kernel = decode_sm90_kernel<T, kWidth, kRows>,
                .width = kWidth,
                .num_threads = S::kThreads,
                .min_blocks = S::kMinBlocks,
                .tile = S::kTile,
                .group_keys = S::kLeastBox,
                .rows = kRows,
                .least_row_warps = 1,
                .shared_bytes = SharedSm90<S>::bytes};
    }
}

template <class T, int kWidth>
DecodeSm90Kernel decode_sm90_kernel_for(int rows) {
    return rows == 8 ? describe_decode_sm90_kernel<T, kWidth, 8>() : describe_decode_sm90_kernel<T, kWidth, 16>();
}

}  // namespace pagewire
