// Chooses the attention kernel, its grid and its work space. Nothing here depends on a length: only on shapes and the
// device, so a captured graph serves any lengths.
#include "cuda/attention/attention.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/attention/decode_kernels.h"
#include "cuda/attention/tiling.h"
#include "cuda/launch.h"
#include "pagewire/dispatch.h"

namespace pagewire {

namespace {

constexpr int64_t kMostUnits = int64_t(1) << 30;

int64_t rows_of_a_head(const AttentionPlan& p) { return int64_t(p.schedule.max_q_len) * p.schedule.group_size; }

// Calls f(Tag<T>{}, Constant<width>{}) for the cache's type and the width that its rows are padded to.
template <class F>
void with_cache(const AttentionPlan& p, F f) {
    const int64_t width = std::max(p.of.k.width, p.of.v.width);
    if (width > 256) throw std::invalid_argument("pagewire: expected head_dim <= 256, got " + std::to_string(width));
    with_dtype(p.of.k.dtype, [&](auto tag) {
        if constexpr (std::is_same_v<typename decltype(tag)::type, float>) {
            throw std::invalid_argument("pagewire: expected a cache in 8 or 16 bits, got fp32");
        } else {
            const int padded = width <= 64 ? 64 : width <= 128 ? 128 : 256;
            with_constant<64, 128, 256>(padded, [&](auto n) { f(tag, n); });
        }
    });
}

// Neither soft cap nor ALiBi, and rows of `width` elements.
bool is_plain(const AttentionPlan& p, int width) {
    return p.of.softcap == 0.0f && p.of.alibi_slopes.data == nullptr && p.of.k.width == width && p.of.v.width == width;
}

DecodeKernel portable_kernel(const AttentionPlan& p) {
    DecodeKernel found{};
    with_cache(p, [&](auto tag, auto width) {
        found = decode_kernel_for<typename decltype(tag)::type, width>(rows_of_a_head(p) > 16, is_plain(p, width));
    });
    return found;
}

// The kernel for the TMA, if the problem is one for it; else its `kernel` is null.
DecodeSm90Kernel sm90_kernel(const AttentionPlan& p) {
    DecodeSm90Kernel found{};
    if (runtime::architecture() < 90 || p.schedule.max_q_len > 1 || rows_of_a_head(p) > 16 || p.scales_by_token) {
        return found;
    }
    with_cache(p, [&](auto tag, auto width) {
        if (!is_plain(p, width)) return;
        const auto kernel =
            decode_sm90_kernel_for<typename decltype(tag)::type, width>(rows_of_a_head(p) <= 8 ? 8 : 16);
        if (kernel.kernel == nullptr || std::gcd(p.page_size, kernel.tile) < kernel.group_keys) return;
        if (kernel.shared_bytes(2) > runtime::shared_memory_of_a_block()) return;
        if (p.of.split_size % kernel.tile != 0) return;  // a box lies in one piece
        if (can_be_tiled(p.of.k) && can_be_tiled(p.of.v)) found = kernel;
    });
    return found;
}

// Rows and units are counted in 32 bits.
void check_count(const AttentionPlan& p, const char* what, int64_t count) {
    if (count <= INT32_MAX) return;
    throw std::invalid_argument(std::string("pagewire: ") + p.of.op + ": expected fewer than 2^31 " + what + ", got " +
                                std::to_string(count));
}

// What the caller says; arrange() fills in the rest.
AttentionPlan plan_of(const AttentionParams& p, const Call& call) {
    const auto small = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX)); };
    const int64_t q_bits = reinterpret_cast<intptr_t>(p.q.data) | (p.q.stride_row | p.q.stride_head) * 2;
    const int64_t item = item_size(p.out.dtype), out_strides = p.out.stride_row | p.out.stride_head;
    return {.of = p,
            .schedule = {.num_kv_heads = small(p.k.num_kv_heads),
                         .group_size = small(p.q.num_heads / std::max<int64_t>(p.k.num_kv_heads, 1)),
                         .max_q_len = p.cu_seqlens_q.data == nullptr ? 1 : small(p.max_q_len),
                         .window_left = small(p.window_left),
                         .capacity = small(p.page_table.max_pages_per_seq * p.k.page_size)},
            .error_word = call.error_word,
            .batch_size = small(p.page_table.batch_size),
            .num_tokens = small(p.q.num_rows),
            .num_pages = small(p.k.num_pages),
            .page_size = small(p.k.page_size),
            .decodes = p.cu_seqlens_q.data == nullptr,
            .q_bfloat16 = p.q.dtype == DType::kBFloat16,
            .q_aligned = q_bits % 16 == 0,
            .out_aligned = (reinterpret_cast<intptr_t>(p.out.data) | out_strides * item) % (4 * item) == 0,
            .scales_by_token = p.k_scale.per_token() || p.v_scale.per_token(),
            .part_stride = small((p.v.width + 3) / 4 * 4 + 4)};
}

template <class Kernel>
int stages_of(const Kernel& kernel) {
    return stages_that_fit(kernel.min_blocks, kernel.shared_bytes, runtime::shared_memory_of_a_block(),
                           runtime::shared_memory_of_a_multiprocessor());
}

// `num_items` of at most `capacity` keys each, in units that can be counted.
int unit_len_of(int tile, int64_t num_items, int64_t capacity) {
    const int64_t tiles = (capacity + tile - 1) / tile;
    return static_cast<int>(std::min<int64_t>(INT32_MAX / tile, 1 + num_items * tiles / kMostUnits)) * tile;
}

struct Grid {
    int64_t num_blocks, partial_rows;
};

// Fills in what follows from the kernel and the device.
template <class Kernel>
Grid arrange(AttentionPlan& p, const Kernel& kernel) {
    Schedule& s = p.schedule;
    const int64_t rows = rows_of_a_head(p);
    p.num_stages = stages_of(kernel);
    p.row_warps = std::max(kernel.least_row_warps, rows <= 16 ? 1 : rows <= 32 ? 2 : 4);
    s.row_tile_len = kernel.rows * p.row_warps;
    s.max_row_tiles = static_cast<int>((rows + s.row_tile_len - 1) / s.row_tile_len);
    s.tile = kernel.tile;
    const int64_t items = int64_t(p.batch_size) * s.num_kv_heads * s.max_row_tiles;
    s.splits = p.of.split_size > 0;
    s.unit_len = s.splits ? static_cast<int>(std::min<int64_t>(p.of.split_size, INT32_MAX))
                          : unit_len_of(s.tile, items, s.capacity);
    p.pages_hold_groups = p.page_size % kernel.group_keys == 0 && s.unit_len % kernel.group_keys == 0 &&
                          p.of.k.width == kernel.width && p.of.v.width == kernel.width;
    p.box_len = std::gcd(p.page_size, s.tile);
    p.all_boxes = static_cast<uint32_t>((uint64_t(1) << std::min(s.tile / p.box_len, 32)) - 1);
    const int64_t on_device =
        int64_t(runtime::num_multiprocessors()) *
        blocks_per_multiprocessor(kernel.kernel, kernel.name, kernel.num_threads, kernel.shared_bytes(p.num_stages));
    const int64_t rows_in_all = int64_t(p.num_tokens) * s.group_size;
    const int units_of_an_item = ceil_div(std::max(s.capacity, 1), s.unit_len);
    const int64_t units = items * units_of_an_item + p.num_tokens;  // and rows without keys
    check_count(p, "rows (tokens * group_size)", rows_in_all);
    if (s.splits) check_count(p, "splits", items * std::min(kMaxSplits, units_of_an_item));
    Grid g{.num_blocks = std::min(on_device, units), .partial_rows = 0};
    if (!s.splits) {
        p.num_counters = static_cast<int>(g.num_blocks);
        g.partial_rows = 2 * g.num_blocks * s.row_tile_len;
        return g;
    }
    s.max_splits = std::min(kMaxSplits, ceil_div(s.capacity, s.unit_len));
    // as many rows as can exist: all tokens', or the most that every request can have
    const int64_t of_tokens = int64_t(p.num_tokens) * s.group_size, of_requests = p.batch_size * rows;
    if (of_tokens <= of_requests) {
        s.part_rows_of_token = s.group_size;
    } else {
        s.part_rows_of_request = rows;
    }
    s.part_rows = std::min(of_tokens, of_requests);
    if (s.max_splits > 1) {
        p.num_counters = static_cast<int>(items);
        g.partial_rows = s.num_kv_heads * s.max_splits * s.part_rows;
    }
    return g;
}

template <class Kernel>
void start(const AttentionPlan& p, const Kernel& kernel, const Grid& g, uintptr_t stream) {
    const LaunchConfig config{.name = kernel.name,
                              .grid_x = g.num_blocks,
                              .grid_y = 1,
                              .num_threads = kernel.num_threads,
                              .shared_bytes = kernel.shared_bytes(p.num_stages),
                              .stream = stream};
    if constexpr (std::is_same_v<Kernel, DecodeSm90Kernel>) {
        launch(kernel.kernel, config, tensor_map_of(p.of.k, p.box_len), tensor_map_of(p.of.v, p.box_len), p);
    } else {
        launch(kernel.kernel, config, p);
    }
}

// Calls f(kernel) with the one that takes the problem.
template <class F>
void with_kernel(const AttentionPlan& p, F f) {
    const DecodeSm90Kernel kernel = sm90_kernel(p);
    kernel.kernel != nullptr ? f(kernel) : f(portable_kernel(p));
}

}  // namespace

AttentionSpace attention_space(const AttentionParams& params, const Call& call) {
    UseDevice guard(call.device);
    AttentionPlan p = plan_of(params, call);
    AttentionSpace space{};
    with_kernel(p, [&](const auto& kernel) {
        const Grid g = arrange(p, kernel);
        space = {.partial_floats = g.partial_rows * p.part_stride, .num_counters = p.num_counters};
    });
    return space;
}

void attention(const AttentionParams& params, const AttentionWorkspace& space, const Call& call) {
    if (params.q.num_rows == 0) return;
    UseDevice guard(call.device);
    AttentionPlan p = plan_of(params, call);
    p.partial = space.partial;
    p.counters = space.counters;
    p.blocks_done = space.blocks_done;
    with_kernel(p, [&](const auto& kernel) {
        const Grid g = arrange(p, kernel);
        start(p, kernel, g, call.stream);
    });
}

}  // namespace pagewire
