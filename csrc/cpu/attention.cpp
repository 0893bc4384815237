// decode and prefill: which pieces there are, who computes them, and the merge of split requests.
//
// The pieces' keys and rows depend on the request alone, never on the batch or the number of
// threads; only the number of heads per piece does, and heads do not meet in the arithmetic. So a
// request's bits depend on nothing else.
#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/ops.h"
#include "cpu/pool.h"
#include "cpu/scratch.h"
#include "pagewire/check.h"

namespace pagewire::cpu {
namespace {

constexpr int64_t kMinSplit = 512, kMaxSplit = 1024;  // keys
constexpr int64_t kMaxSplits = 64;                    // of one request
constexpr int64_t kTilesWanted = 16;                  // of one request and kv head, to balance the load
// Pieces of all heads read whole pages; only where there are too few for the threads, heads are
// shared out, and then less is read in a row.
constexpr int64_t kPiecesPerThread = 2;
constexpr int64_t kBytesPerThread = 128 * 1024;  // of KV, below which waking a thread costs more than it brings

struct Split {  // a request whose keys are shared out
    int64_t row_begin, num_rows, num_splits;
    int64_t out_offset, lse_offset;  // into the partial results, [num_splits, num_rows, num_qo_heads(, head_dim_v)]
};

struct Plan {
    std::vector<Piece> tiles, few;  // few: all heads; divided later
    std::vector<Split> splits;
    int64_t partial_out = 0, partial_lse = 0;  // floats
    int64_t max_few_rows = 0, max_tile_rows = 0;
    int64_t kv_bytes = 0;
};

int64_t split_length(const AttentionParams& p, int64_t seq_len) {
    const int64_t quarter = round_up((seq_len + 3) / 4, kMaxKeyBlock);
    const int64_t wanted = p.split_size > 0 ? p.split_size : std::clamp(quarter, kMinSplit, kMaxSplit);
    return std::max(wanted, round_up((seq_len + kMaxSplits - 1) / kMaxSplits, kMaxKeyBlock));
}

void fill_empty(const AttentionParams& p, int64_t row_begin, int64_t row_end) {
    const int64_t item = item_size(p.out.dtype);
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t head = 0; head < p.out.num_heads; ++head) {
            std::memset(p.out.data + (row * p.out.stride_row + head * p.out.stride_head) * item, 0, p.out.width * item);
            if (p.lse.data != nullptr) {
                p.lse.data[row * p.lse.stride_row + head * p.lse.stride_head] =
                    p.sinks.data != nullptr ? p.sinks.data[head * p.sinks.stride_head]
                                            : -std::numeric_limits<float>::infinity();
            }
        }
    }
}

// Rows [row_begin, row_end) against the keys they see, in one part or several.
void plan_rows(const AttentionParams& p, Piece piece, bool few, bool may_split, Plan& plan) {
    const int64_t last = piece.position + (piece.row_end - piece.row_begin) - 1;
    const int64_t begin = visible_keys(p, piece.seq_len, piece.position).begin;
    const int64_t end = visible_keys(p, piece.seq_len, last).end;
    if (begin >= end) return fill_empty(p, piece.row_begin, piece.row_end);
    plan.kv_bytes += (end - begin) * p.k.num_kv_heads * (p.k.width + p.v.width) * item_size(p.k.dtype);
    const int64_t rows = piece.row_end - piece.row_begin;
    const int64_t group = p.q.num_heads / p.k.num_kv_heads;
    int64_t& max_rows = few ? plan.max_few_rows : plan.max_tile_rows;
    max_rows = std::max(max_rows, rows * group);

    const int64_t length = may_split ? split_length(p, piece.seq_len) : end;
    const int64_t first = begin / length;
    const int64_t num_splits = (end + length - 1) / length - first;
    const int64_t lse_size = rows * p.q.num_heads;
    const int64_t out_size = lse_size * p.v.width;
    if (num_splits > 1) {
        plan.splits.push_back({.row_begin = piece.row_begin,
                               .num_rows = rows,
                               .num_splits = num_splits,
                               .out_offset = plan.partial_out,
                               .lse_offset = plan.partial_lse});
        plan.partial_out += num_splits * out_size;
        plan.partial_lse += num_splits * lse_size;
    }
    for (int64_t i = 0; i < num_splits; ++i) {
        piece.key_begin = std::max(begin, (first + i) * length);
        piece.key_end = std::min(end, (first + i + 1) * length);
        piece.split = num_splits > 1 ? int64_t(plan.splits.size()) - 1 : -1;
        piece.part = i;
        (few ? plan.few : plan.tiles).push_back(piece);
    }
}

Plan make_plan(const AttentionParams& p) {
    Plan plan;
    const int64_t group = p.k.num_kv_heads == 0 ? 1 : p.q.num_heads / p.k.num_kv_heads;
    for (int64_t b = 0; b < p.page_table.batch_size; ++b) {
        const int64_t row = row_begin(p, b);
        const int64_t row_end = row_begin(p, b + 1);
        const int64_t q_len = row_end - row;
        if (q_len == 0) continue;
        Piece piece{};
        piece.request = b;
        piece.seq_len = p.seq_lens[b];
        piece.head_end = p.k.num_kv_heads;
        const int64_t tile_tokens =
            std::max<int64_t>(1, std::clamp<int64_t>(q_len * group / kTilesWanted, kTileRows, kMaxTileRows) / group);
        const bool few = q_len * group <= kFewRows;
        const bool may_split = few || q_len <= tile_tokens;
        const int64_t step = may_split ? q_len : tile_tokens;
        for (int64_t at = row; at < row_end; at += step) {
            piece.row_begin = at;
            piece.row_end = std::min(at + step, row_end);
            piece.position = piece.seq_len - row_end + at;
            plan_rows(p, piece, few, may_split, plan);
        }
    }
    return plan;
}

// Pieces of all heads become pieces of some: as many as balance the threads.
std::vector<Piece> divide_heads(const std::vector<Piece>& pieces, int64_t heads, int64_t heads_each) {
    std::vector<Piece> divided;
    for (Piece piece : pieces) {
        for (int64_t h = 0; h < heads; h += heads_each) {
            piece.head_begin = h;
            piece.head_end = std::min(h + heads_each, heads);
            divided.push_back(piece);
        }
    }
    return divided;
}

void merge_splits(const AttentionParams& p, const Plan& plan, float* outs, float* lses, const Kernels& kernels,
                  int num_threads) {
    parallel_for(num_threads, int64_t(plan.splits.size()), [&](int64_t i, int) {
        const Split& split = plan.splits[i];
        float weights[kMaxSplits + 1];
        const int64_t heads = p.q.num_heads;
        const int64_t width = p.v.width;
        const int64_t lse_size = split.num_rows * heads;
        const auto state = [&](int64_t s) -> StateView {
            char* out = reinterpret_cast<char*>(outs + split.out_offset + s * lse_size * width);
            return {.out = {.data = out,
                            .dtype = DType::kFloat32,
                            .num_rows = split.num_rows,
                            .num_heads = heads,
                            .width = width,
                            .stride_row = heads * width,
                            .stride_head = width},
                    .lse = {.data = lses + split.lse_offset + s * lse_size, .stride_row = heads, .stride_head = 1}};
        };
        MergeParams merge{.first = state(0),
                          .second = state(1),
                          .stride_out = lse_size * width,
                          .stride_lse = lse_size,
                          .n = split.num_splits,
                          .out = p.out,
                          .lse = p.lse,
                          .sinks = p.sinks};
        merge.out.data += split.row_begin * p.out.stride_row * item_size(p.out.dtype);
        if (merge.lse.data != nullptr) merge.lse.data += split.row_begin * p.lse.stride_row;
        kernels.merge_states(merge, 0, split.num_rows, weights);
    });
}

}  // namespace

void attention(const AttentionParams& p, const Kernels& kernels, int num_threads) {
    check_query_rows(p);
    check_pages(p);
    Plan plan = make_plan(p);
    fill_empty(p, row_begin(p, p.page_table.batch_size), p.q.num_rows);

    const int64_t heads = p.k.num_kv_heads;
    const int64_t wanted = kPiecesPerThread * num_threads;
    const int64_t units = std::max<int64_t>(1, int64_t(plan.few.size()));
    const int64_t blocks = std::clamp<int64_t>((wanted + units - 1) / units, 1, std::max<int64_t>(heads, 1));
    const int64_t heads_each = std::max<int64_t>(1, (heads + blocks - 1) / blocks);
    std::vector<Piece> tiles = divide_heads(plan.tiles, heads, 1);
    std::vector<Piece> few = divide_heads(plan.few, heads, heads_each);
    // The longest first, for a thread must not be left alone with one at the end; but what shares
    // keys stays together, so that they are still in the cache.
    std::stable_sort(tiles.begin(), tiles.end(), [](const Piece& a, const Piece& b) {
        const auto order = [](const Piece& x) {
            return std::make_tuple(-x.seq_len, x.request, x.head_begin, x.key_begin - x.key_end);
        };
        return order(a) < order(b);
    });

    static thread_local Scratch partials;
    static thread_local Scratch workspace;
    float* outs = nullptr;
    float* lses = nullptr;
    if (plan.partial_out > 0) {
        outs =
            reinterpret_cast<float*>(partials.reserve((plan.partial_out + plan.partial_lse) * int64_t(sizeof(float))));
        lses = outs + plan.partial_out;
    }
    for (std::vector<Piece>* pieces : {&tiles, &few}) {
        for (Piece& piece : *pieces) {
            if (piece.split < 0) continue;
            const Split& split = plan.splits[piece.split];
            const int64_t lse_size = split.num_rows * p.q.num_heads;
            piece.partial_out = outs + split.out_offset + piece.part * lse_size * p.v.width;
            piece.partial_lse = lses + split.lse_offset + piece.part * lse_size;
        }
    }

    Carver few_size{nullptr};
    Carver tile_size{nullptr};
    FewRowsScratch().carve(few_size, heads_each, plan.max_few_rows, p.k.width, p.v.width);
    TileScratch().carve(tile_size, plan.max_tile_rows, p.k.width, p.v.width);
    const int64_t bytes = std::max(few.empty() ? 0 : few_size.used, tiles.empty() ? 0 : tile_size.used);
    if (tiles.empty()) num_threads = int(std::clamp<int64_t>(plan.kv_bytes / kBytesPerThread, 1, num_threads));
    char* scratch = workspace.reserve(bytes * num_threads);
    const int64_t num_tiles = int64_t(tiles.size());
    parallel_for(num_threads, num_tiles + int64_t(few.size()), [&](int64_t i, int thread) {
        if (i < num_tiles) {
            kernels.attend_tile(p, tiles[i], scratch + thread * bytes);
        } else {
            kernels.attend_few_rows(p, few[i - num_tiles], scratch + thread * bytes);
        }
    });
    merge_splits(p, plan, outs, lses, kernels, num_threads);
}

}  // namespace pagewire::cpu
