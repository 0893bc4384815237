// Chooses the attention kernel, its grid and its work space. Nothing here depends on a length: only
// on shapes and the device, so a captured graph serves any lengths.
#include "cuda/attention.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/attention_instances.h"

namespace pagewire {

template <>
AttentionKernel attention_kernel_for<BFloat16, 64>(DType, size_t);
template <>
AttentionKernel attention_kernel_for<BFloat16, 128>(DType, size_t);
template <>
AttentionKernel attention_kernel_for<BFloat16, 256>(DType, size_t);
template <>
AttentionKernel attention_kernel_for<Float16, 64>(DType, size_t);
template <>
AttentionKernel attention_kernel_for<Float16, 128>(DType, size_t);
template <>
AttentionKernel attention_kernel_for<Float16, 256>(DType, size_t);

namespace {

AttentionKernel choose(const AttentionParams& p) {
    const int64_t width = std::max(p.k.width, p.v.width);
    if (width > 256) throw std::invalid_argument("pagewire: expected head_dim <= 256, got " + std::to_string(width));
    const size_t shared = runtime::shared_memory_of_a_block();
    const auto of = [&](auto for64, auto for128, auto for256) {
        return width <= 64    ? for64(p.k.dtype, shared)
               : width <= 128 ? for128(p.k.dtype, shared)
                              : for256(p.k.dtype, shared);
    };
    switch (p.q.dtype) {
        case DType::kBFloat16:
            return of(attention_kernel_for<BFloat16, 64>, attention_kernel_for<BFloat16, 128>,
                      attention_kernel_for<BFloat16, 256>);
        case DType::kFloat16:
            return of(attention_kernel_for<Float16, 64>, attention_kernel_for<Float16, 128>,
                      attention_kernel_for<Float16, 256>);
        default:
            throw std::invalid_argument("pagewire: expected q in fp16 or bf16");
    }
}

AttentionCache cache_of(const CacheView& cache, const ScaleView& scale) {
    const int64_t item = item_size(cache.dtype);
    AttentionCache c{.data = cache.data,
                     .stride_page = cache.stride_page * item,
                     .stride_token = cache.stride_token * item,
                     .stride_head = cache.stride_head * item,
                     .width = static_cast<int>(cache.width),
                     .aligned = false,
                     .scale = scale};
    c.aligned = ((reinterpret_cast<intptr_t>(c.data) | c.stride_page | c.stride_token | c.stride_head) & 15) == 0;
    return c;
}

// What the caller says; the launcher fills in the rest.
AttentionPlan plan_of(const AttentionParams& p, const Call& call) {
    const auto small = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX)); };
    const int64_t q_strides = (p.q.stride_row | p.q.stride_head) * item_size(p.q.dtype);
    return {.q = p.q.data,
            .q_stride_row = p.q.stride_row,
            .q_stride_head = p.q.stride_head,
            .k = cache_of(p.k, p.k_scale),
            .v = cache_of(p.v, p.v_scale),
            .page_table = p.page_table.data,
            .table_stride = p.page_table.stride_row,
            .seq_lens = static_cast<const int32_t*>(p.seq_lens.data),
            .seq_lens_stride = p.seq_lens.stride,
            .cu_seqlens_q = static_cast<const int32_t*>(p.cu_seqlens_q.data),
            .out = p.out.data,
            .out_stride_row = p.out.stride_row,
            .out_stride_head = p.out.stride_head,
            .lse = p.lse.data,
            .lse_stride_row = p.lse.stride_row,
            .lse_stride_head = p.lse.stride_head,
            .alibi_slopes = p.alibi_slopes.data,
            .alibi_stride_request = p.alibi_slopes.stride_row,
            .alibi_stride_head = p.alibi_slopes.stride_head,
            .sinks = p.sinks.data,
            .sinks_stride = p.sinks.stride_head,
            .batch_size = small(p.page_table.batch_size),
            .num_tokens = small(p.q.num_rows),
            .num_kv_heads = small(p.k.num_kv_heads),
            .group_size = small(p.q.num_heads / std::max<int64_t>(p.k.num_kv_heads, 1)),
            .num_pages = small(p.k.num_pages),
            .page_size = small(p.k.page_size),
            .max_pages_per_seq = small(p.page_table.max_pages_per_seq),
            .max_q_len = p.cu_seqlens_q.data == nullptr ? 1 : small(p.max_q_len),
            .softmax_scale = p.softmax_scale,
            .softcap = p.softcap,
            .causal = p.causal,
            .out_float32 = p.out.dtype == DType::kFloat32,
            .q_aligned = ((reinterpret_cast<intptr_t>(p.q.data) | q_strides) & 15) == 0,
            .window_left = small(p.window_left),
            .window_right = small(p.window_right),
            .split_size = small(p.split_size),
            .error_word = call.error_word};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Grid {
    int64_t num_blocks, partial_rows;
};

// Fills in what the plan leaves to the launcher.
Grid arrange(AttentionPlan& p, const AttentionKernel& kernel) {
    const int64_t rows = int64_t(p.max_q_len) * p.group_size;  // of a request and kv head
    const int num_warps = kernel.num_threads / 32;
    p.warps_m = 1;
    while (p.warps_m < num_warps && 16 * p.warps_m < rows) p.warps_m *= 2;
    p.chunk_rows = 16 * p.warps_m;
    p.max_chunks = static_cast<int>(ceil_div(rows, p.chunk_rows));
    p.part_stride = static_cast<int>(ceil_div(p.v.width, 4)) * 4 + 4;
    const int64_t capacity = int64_t(p.max_pages_per_seq) * p.page_size;
    const int64_t items = int64_t(p.batch_size) * p.num_kv_heads * p.max_chunks;
    const int64_t on_device =
        int64_t(runtime::num_multiprocessors()) *
        blocks_per_multiprocessor(kernel.kernel, kernel.name, kernel.num_threads, kernel.shared_bytes(p.warps_m));
    const int64_t unit = p.split_size > 0 ? p.split_size : kernel.tile;
    Grid g{};
    // rows of empty requests are written by all blocks too
    g.num_blocks = std::min(on_device, std::max<int64_t>(items * ceil_div(capacity, unit), p.num_tokens));
    if (p.split_size == 0) {
        p.num_counters = static_cast<int>(g.num_blocks);
        g.partial_rows = 2 * g.num_blocks * p.chunk_rows;
        return g;
    }
    p.max_splits = static_cast<int>(std::min<int64_t>(64, ceil_div(capacity, p.split_size)));
    // as many rows as can exist: all tokens', or the most that every request can have
    const int64_t of_tokens = int64_t(p.num_tokens) * p.group_size, of_requests = p.batch_size * rows;
    if (of_tokens <= of_requests) {
        p.part_rows_of_token = p.group_size;
    } else {
        p.part_rows_of_request = rows;
    }
    p.part_rows = std::min(of_tokens, of_requests);
    if (p.max_splits > 1) {
        p.num_counters = static_cast<int>(items);
        g.partial_rows = p.num_kv_heads * p.max_splits * p.part_rows;
    }
    return g;
}

}  // namespace

AttentionSpace attention_space(const AttentionParams& params, const Call& call) {
    UseDevice guard(call.device);
    AttentionPlan p = plan_of(params, call);
    const Grid g = arrange(p, choose(params));
    return {.partial_floats = g.partial_rows * p.part_stride, .num_counters = p.num_counters};
}

void attention(const AttentionParams& params, const AttentionWorkspace& space, const Call& call) {
    if (params.q.num_rows == 0) return;
    UseDevice guard(call.device);
    AttentionPlan p = plan_of(params, call);
    p.partial = space.partial;
    p.counters = space.counters;
    p.blocks_done = space.blocks_done;
    const AttentionKernel kernel = choose(params);
    const Grid g = arrange(p, kernel);
    launch(kernel.kernel,
           LaunchConfig{.name = kernel.name,
                        .grid_x = g.num_blocks,
                        .grid_y = 1,
                        .num_threads = kernel.num_threads,
                        .shared_bytes = kernel.shared_bytes(p.warps_m),
                        .stream = call.stream},
           p);
}

}  // namespace pagewire
