// Which kernel runs a problem. Each pair of query type and padded width is compiled in a file of
// its own.
#pragma once

#include "cuda/attention.h"
#include "cuda/attention_kernel.h"

namespace pagewire {

struct AttentionKernel {
    const char* name;
    void (*kernel)(AttentionPlan);
    int num_threads, tile, part_stride;
    size_t (*shared_bytes)(int warps_m);
};

template <class Q, class KV, int kWidth>
AttentionKernel describe_attention_kernel() {
    using S = Shape<Q, KV, kWidth>;
    return {"attention_kernel", attention_kernel<Q, KV, kWidth>,
            S::kThreads,        S::kTile,
            S::kPartStride,     S::shared_bytes};
}

// `kv` is Q itself or one of the 8-bit types.
template <class Q, int kWidth>
AttentionKernel attention_kernel_for(DType kv);

// Defines it; used once per file.
#define PAGEWIRE_ATTENTION_INSTANCES(Q, kWidth)                            \
    template <>                                                            \
    AttentionKernel attention_kernel_for<Q, kWidth>(DType kv) {            \
        switch (kv) {                                                      \
            case DType::kFloat8E4M3:                                       \
                return describe_attention_kernel<Q, Float8E4M3, kWidth>(); \
            case DType::kFloat8E5M2:                                       \
                return describe_attention_kernel<Q, Float8E5M2, kWidth>(); \
            case DType::kInt8:                                             \
                return describe_attention_kernel<Q, int8_t, kWidth>();     \
            default:                                                       \
                return describe_attention_kernel<Q, Q, kWidth>();          \
        }                                                                  \
    }

}  // namespace pagewire
