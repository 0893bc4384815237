// Non-owning views: a pointer, its shape, its strides in elements (64-bit: caches exceed 2^31 elements).
#pragma once

#include <cstdint>

#include "pagewire/dtype.h"

namespace pagewire {

// One layer's K or V, as NHD whatever the layout in memory; the last dim is contiguous.
struct CacheView {
    char* data;  // [num_pages, page_size, num_kv_heads, width]
    DType dtype;
    int64_t num_pages, page_size, num_kv_heads, width;
    int64_t stride_page, stride_token, stride_head;
};

// Rows of heads: q, out, new k and v; the last dim is contiguous.
struct RowsView {
    char* data;  // [num_rows, num_heads, width]
    DType dtype;
    int64_t num_rows, num_heads, width;
    int64_t stride_row, stride_head;
};

struct MatrixView {
    float* data;  // [num_rows, num_heads]; null: not wanted
    int64_t stride_row, stride_head;
};

struct IndexView {
    const void* data;  // [size] int32 or int64
    bool is_int64;
    int64_t size, stride;

    constexpr int64_t operator[](int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
    }
};

struct PageTableView {
    const int32_t* data;  // [batch_size, max_pages_per_seq], the last dim contiguous
    int64_t batch_size, max_pages_per_seq, stride_row;

    constexpr int32_t at(int64_t request, int64_t entry) const { return data[request * stride_row + entry]; }
};

// The words of pagewire/types.py, and a number that the host knows.
enum class ScaleKind : int { kNone, kNumber, kTensor, kHead, kBatchHead, kTokenHead };

// real = stored * scale. Unused strides are 0, so that one formula serves every kind that has data.
struct ScaleView {
    ScaleKind kind = ScaleKind::kNone;
    float value = 1.0f;     // kNumber
    float* data = nullptr;  // [], [heads], [batch_size, heads] or [num_pages, page_size, heads]
    int64_t stride_batch = 0, stride_page = 0, stride_token = 0, stride_head = 0;

    constexpr bool has_data() const { return data != nullptr; }
    constexpr bool per_token() const { return kind == ScaleKind::kTokenHead; }
    // Not for kTokenHead.
    constexpr float of(int64_t request, int64_t head) const {
        return has_data() ? data[request * stride_batch + head * stride_head] : value;
    }
    constexpr float* at(int64_t page, int64_t offset, int64_t head) const {
        return data + page * stride_page + offset * stride_token + head * stride_head;
    }
};

}  // namespace pagewire
