// Which kernel takes a problem; each cache type's are compiled in a file of its own.
#pragma once

#include <cstddef>

#include "cuda/attention/plan.h"
#include "cuda/device/tma.h"
#include "pagewire/dtype.h"

namespace pagewire {

constexpr int kMaxStages = 4;

// Of a block's copies: as many as let the most blocks, at most min_blocks, share a multiprocessor; two at least. bytes(n):
// of a block with n stages.
template <class Bytes>
constexpr int stages_that_fit(int min_blocks, Bytes bytes, size_t of_a_block, size_t of_a_multiprocessor) {
    constexpr size_t kOfTheSystem = 1024;
    for (int blocks = min_blocks; blocks > 0; --blocks) {
        for (int stages = kMaxStages; stages >= 2; --stages) {
            const size_t all = static_cast<size_t>(blocks) * (bytes(stages) + kOfTheSystem);
            if (bytes(stages) <= of_a_block && all <= of_a_multiprocessor) return stages;
        }
    }
    return 2;
}

template <class... Maps>
struct AttentionKernel {
    const char* name;
    void (*kernel)(Maps..., AttentionPlan);
    int width, num_threads, min_blocks, tile;
    int group_keys;             // neighbours that lie in one page or go the slow way
    int rows, least_row_warps;  // packed rows of a warp; warps that take different rows, at least
    size_t (*shared_bytes)(int num_stages);
};
using DecodeKernel = AttentionKernel<>;
using DecodeSm90Kernel = AttentionKernel<TensorMap, TensorMap>;  // of K and V

// Of a cache of T and rows padded to kWidth elements. wide: 17 to 64 packed rows; plain: neither soft cap nor ALiBi, and
// all of kWidth is used.
template <class T, int kWidth>
DecodeKernel decode_kernel_for(bool wide, bool plain);

// Of at most `rows` packed rows: 8 or 16. Its `kernel` is null where rows are not whole panels of 128 bytes.
template <class T, int kWidth>
DecodeSm90Kernel decode_sm90_kernel_for(int rows);

}  // namespace pagewire
