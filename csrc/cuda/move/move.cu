// append_kv, pack_kv, unpack_kv: what is launched.
#include "cuda/move/move.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/move/convert.h"
#include "cuda/move/copy.h"

namespace pagewire {

namespace moving {
namespace {

constexpr int kFull = 8;  // blocks of a multiprocessor
constexpr int kWaves =
    2;  // at least, of a full device's blocks, where planes can be shared out: runs stay long, gaps small

static_assert(sizeof(Plan<kUsualLayers>) <= 4096 && sizeof(Plan<kManyLayers>) <= 32764);

// Alike but for the pointers.
bool is_alike(const MoveSide& a, const MoveSide& b) {
    const ScaleView &s = a.scale, &t = b.scale;
    return a.dtype == b.dtype && a.stride_page == b.stride_page && a.stride_token == b.stride_token &&
           a.stride_head == b.stride_head && s.kind == t.kind && s.value == t.value && s.stride_page == t.stride_page &&
           s.stride_token == t.stride_token && s.stride_head == t.stride_head;
}
bool is_alike(const Move& a, const Move& b) {
    return a.width == b.width && a.how == b.how && is_alike(a.source, b.source) && is_alike(a.target, b.target);
}

// How many layers from the first on are alike: these are one launch.
int num_alike(const MoveParams& p, const Move* moves, int num_layers) {
    for (int layer = 1; layer < num_layers; ++layer) {
        for (int part = 0; part < p.num_parts; ++part) {
            if (!is_alike(moves[layer * p.num_parts + part], moves[part])) return layer;
        }
    }
    return num_layers;
}

Rows rows_of(const MoveParams& p, const Move& first, int64_t* error_word) {
    const MoveSide& paged = p.to_cache ? first.target : first.source;
    const bool head_fastest = paged.stride_head <= paged.stride_token;
    return {.num_rows = static_cast<uint32_t>(p.slots.size * p.num_heads),
            .head_fastest = head_fastest,
            .fastest = Divisor<uint32_t>(head_fastest ? p.num_heads : p.slots.size),
            .slots = p.slots,
            .num_slots = p.num_slots,
            .page_size = Divisor<uint64_t>(p.page_size),
            .page_size32 = Divisor<uint32_t>(p.page_size),
            .slots_on_source = !p.to_cache,
            .skip_negative = p.is_append,
            .error_kind = p.is_append  ? ErrorKind::kAppendSlot
                          : p.to_cache ? ErrorKind::kUnpackSlot
                                       : ErrorKind::kPackSlot,
            .error_word = error_word};
}

Move in_bytes(Move m) {
    for (MoveSide* side : {&m.source, &m.target}) {
        side->stride_page *= item_size(side->dtype);
        side->stride_token *= item_size(side->dtype);
        side->stride_head *= item_size(side->dtype);
    }
    return m;
}

// The largest power of two, at most 16, that every address and stride is a multiple of, and the bytes of a copied row.
int alignment_of(const MoveParams& p, const Move* moves, int num_layers) {
    int64_t bits = 16;
    for (int i = 0; i < num_layers * p.num_parts; ++i) {
        for (const MoveSide* side : {&moves[i].source, &moves[i].target}) {
            bits |= reinterpret_cast<intptr_t>(side->data);
            bits |= (side->stride_page | side->stride_token | side->stride_head) * item_size(side->dtype);
        }
        if (moves[i].how == MoveHow::kCopy) bits |= moves[i].width * item_size(moves[i].source.dtype);
    }
    return static_cast<int>(bits & -bits);
}

// Shares the planes out so that the device is filled. From shapes alone: graphs are captured.
template <int kLayers>
void start(Plan<kLayers>& p, void (*kernel)(Plan<kLayers>), const char* name, int64_t grid_x, const Call& call) {
    const int64_t blocks = int64_t(kWaves) * kFull * runtime::num_multiprocessors();
    const int64_t planes = int64_t(p.num_layers) * p.num_parts;
    const int64_t runs = std::clamp<int64_t>((blocks + grid_x - 1) / grid_x, 1, planes);
    p.planes_per_block = static_cast<int>((planes + runs - 1) / runs);
    launch(kernel,
           LaunchConfig{.name = name,
                        .grid_x = grid_x,
                        .grid_y = (planes + p.planes_per_block - 1) / p.planes_per_block,
                        .num_threads = kThreads,
                        .shared_bytes = 0,
                        .stream = call.stream},
           p);
}

template <int kLayers>
void copy(Plan<kLayers>& p, int64_t row_bytes, const Call& call) {
    const int64_t units = std::max<int64_t>(row_bytes / p.align, 1), most = kThreads * kUnits;
    const int64_t pieces = (units + most - 1) / most;
    p.pieces = Divisor<uint32_t>(pieces);
    p.units = Divisor<uint32_t>(std::min(units, most));
    p.rows_of_block = static_cast<uint32_t>(most / p.units.divisor);
    start(p, copy_kernel<kLayers>, "copy_kernel", (p.rows.num_rows + p.rows_of_block - 1) / p.rows_of_block * pieces,
          call);
}

template <int kLayers, int kElements>
void convert(Plan<kLayers>& p, int64_t width, const Call& call) {
    while ((kElements << p.log2_lanes) < width && p.log2_lanes < 5) ++p.log2_lanes;
    const int64_t rows = kThreads >> p.log2_lanes;
    start(p, convert_kernel<kLayers, kElements>, "convert_kernel", (p.rows.num_rows + rows - 1) / rows, call);
}

template <int kLayers>
void run(const MoveParams& q, const Move* moves, int num_layers, const Call& call) {
    Plan<kLayers> p{};
    p.rows = rows_of(q, moves[0], call.error_word);
    p.num_parts = q.num_parts;
    p.num_layers = num_layers;
    p.num_heads = static_cast<uint32_t>(q.num_heads);
    p.parts_alike = q.num_parts == 1 || is_alike(moves[0], moves[1]);
    p.align = alignment_of(q, moves, num_layers);
    int64_t width = 0, row_bytes = 0;
    bool is_chunked = p.align == 16;
    for (int part = 0; part < q.num_parts; ++part) {
        p.part[part] = in_bytes(moves[part]);
        width = std::max(width, moves[part].width);
        row_bytes = std::max(row_bytes, moves[part].width * item_size(moves[part].source.dtype));
        is_chunked = is_chunked && moves[part].width % 16 == 0;
        for (int layer = 0; layer < num_layers; ++layer) {
            const Move& m = moves[layer * q.num_parts + part];
            p.plane[layer][part] = {m.source.data, m.target.data, m.source.scale.data, m.target.scale.data};
        }
    }
    if (moves[0].how == MoveHow::kCopy) return copy(p, row_bytes, call);  // K and V alike
    return is_chunked ? convert<kLayers, 16>(p, width, call) : convert<kLayers, 1>(p, width, call);
}

}  // namespace
}  // namespace moving

void move(const MoveParams& p, const Call& call) {
    const int64_t num_rows = p.slots.size * p.num_heads;
    if (num_rows == 0 || p.num_moves == 0) return;  // a grid without blocks is an error
    if (num_rows >= (int64_t(1) << 31)) {
        throw std::invalid_argument("pagewire: expected fewer than 2^31 rows (tokens * heads), got " +
                                    std::to_string(num_rows));
    }
    UseDevice guard(call.device);
    int left = static_cast<int>(p.num_moves / p.num_parts);
    for (const Move* moves = p.moves; left > 0;) {
        const int layers = std::min(moving::kManyLayers, moving::num_alike(p, moves, left));
        if (layers == 1) {
            moving::run<1>(p, moves, layers, call);
        } else if (layers <= moving::kUsualLayers) {
            moving::run<moving::kUsualLayers>(p, moves, layers, call);
        } else {
            moving::run<moving::kManyLayers>(p, moves, layers, call);
        }
        moves += layers * p.num_parts;
        left -= layers;
    }
}

}  // namespace pagewire
