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

AttentionKernel choose(const AttentionRequest& r) {
    const int width = std::max(r.plan.k.width, r.plan.v.width);
    if (width > 256) throw std::invalid_argument("pagewire: expected head_dim <= 256, got " + std::to_string(width));
    const size_t shared = runtime::shared_memory_of_a_block();
    const auto of = [&](auto for64, auto for128, auto for256) {
        return width <= 64    ? for64(r.kv_dtype, shared)
               : width <= 128 ? for128(r.kv_dtype, shared)
                              : for256(r.kv_dtype, shared);
    };
    switch (r.q_dtype) {
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
    int64_t grid, partial_rows;
};

// Fills in what the plan leaves to the launcher.
Geometry arrange(AttentionPlan& p, const AttentionKernel& kernel) {
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
    Geometry g{};
    // rows of empty requests are written by all blocks too
    g.grid = std::min(on_device, std::max<int64_t>(items * ceil_div(capacity, unit), p.num_tokens));
    if (p.split_size == 0) {
        p.num_counters = static_cast<int>(g.grid);
        g.partial_rows = 2 * g.grid * p.chunk_rows;
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

AttentionSpace attention_space(const AttentionRequest& request) {
    UseDevice guard(request.device);
    AttentionRequest r = request;
    const AttentionKernel kernel = choose(r);
    const Geometry g = arrange(r.plan, kernel);
    return {g.partial_rows * r.plan.part_stride, r.plan.num_counters};
}

void attention(const AttentionRequest& request) {
    if (request.plan.num_tokens == 0) return;
    UseDevice guard(request.device);
    AttentionRequest r = request;
    const AttentionKernel kernel = choose(r);
    const Geometry g = arrange(r.plan, kernel);
    launch(kernel.kernel,
           LaunchConfig{kernel.name, g.grid, 1, kernel.num_threads, kernel.shared_bytes(r.plan.warps_m), r.stream},
           r.plan);
}

}  // namespace pagewire
