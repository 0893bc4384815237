// Which kernel runs a problem. Each pair of query type and padded width is compiled in a file of its own.
#pragma once

#include "cuda/attention.h"
#include "cuda/attention_kernel.h"

namespace pagewire {

struct AttentionKernel {
    const char* name;
    void (*kernel)(AttentionPlan);
    int num_threads, tile;
    size_t (*shared_bytes)(int warps_m);
};

template <class Q, class KV, int kWidth, bool kSmall>
AttentionKernel describe() {
    using S = Shape<Q, KV, kWidth, kSmall>;
    return {"attention_kernel", attention_kernel<Q, KV, kWidth, kSmall>, S::kThreads, S::kTile, S::shared_bytes};
}

// The kernel with as many stages as a block of `shared_memory` bytes has room for. Width 64 fits everywhere.
template <class Q, class KV, int kWidth>
AttentionKernel describe_attention_kernel(size_t shared_memory) {
    using Large = Shape<Q, KV, kWidth, false>;
    if constexpr (kWidth > 64) {
        if (Large::shared_bytes(Large::kWarps) > shared_memory) {
            return describe<Q, KV, kWidth, true>();
        }
    }
    return describe<Q, KV, kWidth, false>();
}

// `kv` is Q itself or one of the 8-bit types.
template <class Q, int kWidth>
AttentionKernel attention_kernel_for(DType kv, size_t shared_memory);

// Defines it; used once per file.
#define PAGEWIRE_ATTENTION_INSTANCES(Q, kWidth)                                         \
    template <>                                                                         \
    AttentionKernel attention_kernel_for<Q, kWidth>(DType kv, size_t shared_memory) {   \
        switch (kv) {                                                                   \
            case DType::kFloat8E4M3:                                                    \
                return describe_attention_kernel<Q, Float8E4M3, kWidth>(shared_memory); \
            case DType::kFloat8E5M2:                                                    \
                return describe_attention_kernel<Q, Float8E5M2, kWidth>(shared_memory); \
            case DType::kInt8:                                                          \
                return describe_attention_kernel<Q, int8_t, kWidth>(shared_memory);     \
            default:                                                                    \
                return describe_attention_kernel<Q, Q, kWidth>(shared_memory);          \
        }                                                                               \
    }

}  // namespace pagewire
