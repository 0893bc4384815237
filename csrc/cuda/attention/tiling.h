// A cache as the TMA sees it: (element, token of a page, kv head, page).
#pragma once

#include "cuda/tensor_map.h"
#include "pagewire/views.h"

namespace pagewire {

inline TensorTiling tiling_of(const CacheView& cache, int box_len) {
    const int64_t item = item_size(cache.dtype), row = cache.width * item;
    // of a dimension of one, any stride will do
    const auto bytes = [&](int64_t extent, int64_t stride) { return extent > 1 ? stride * item : row; };
    return {.base = cache.data,
            .element_bytes = static_cast<int>(item),
            .dims = {cache.width, cache.page_size, cache.num_kv_heads, cache.num_pages},
            .strides = {bytes(cache.page_size, cache.stride_token), bytes(cache.num_kv_heads, cache.stride_head),
                        bytes(cache.num_pages, cache.stride_page)},
            .box = {128 / item, box_len, 1, 1}};
}

inline bool can_be_tiled(const CacheView& cache) {
    const TensorTiling tiling = tiling_of(cache, 8);
    for (int64_t stride : tiling.strides) {
        if (stride == 0) return false;
    }
    return refusal(tiling).empty();
}

inline TensorMap tensor_map_of(const CacheView& cache, int box_len) {
    return encode_tensor_map(tiling_of(cache, box_len));
}

}  // namespace pagewire
