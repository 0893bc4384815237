// The attention kernel: decode, and prefill of short queries.
//
// grid: [blocks that fit on the device, 1]; a block walks over its share of all units
// (attention_work.h).
//
// The query heads of a group (times the rows of a short query) are packed to the tensor core's 16
// rows, so every KV byte is read once. Warps take different keys of a tile, each with a softmax
// state of its own and, while there are at most 16 rows, a copy pipeline of its own: no block
// barrier in the main loop. With more rows, warps_m warps take 16 rows each over the same tile in
// shared memory.
//
// Plan (128 threads; 64 for width 256), bytes of K and V in flight = (kStages - 1) * stage:
//   width 64:  4 stages of 16 KiB, 2 blocks on sm_80 (48 KiB in flight each), 3 on sm_90
//   width 128: 3 stages of 32 KiB, 1 block on sm_80 (64 KiB in flight), 2 on sm_90
//   width 256: 3 stages of 32 KiB, 1 block on sm_80 (64 KiB in flight), 2 on sm_90
// At most 168 registers for width 64, 255 for the others: 3 and 2 blocks. No spills, no local
// memory.
//
// Merging parts: a block writes its part, fences, then counts itself in; the block that counts last
// has, by its own fence, every other part before it, reads them past L1 and resets the counter for
// the next launch on the stream.
#pragma once

#include "cuda/attention_work.h"
#include "cuda/convert.h"
#include "cuda/launch.h"

namespace pagewire {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Everything that follows from the element types and the padded width.
template <class Q, class KV, int kWidth_>
struct Shape {
    static constexpr int kWidth = kWidth_;
    static constexpr bool kQuantised = sizeof(KV) == 1;
    static constexpr int kWarps = kWidth == 256 ? 2 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kMinBlocks = kWidth == 64 ? 3 : 2;
    static constexpr int kStages = kWidth == 64 ? 4 : 3;
    static constexpr int kKeys =
        32 / static_cast<int>(sizeof(KV));  // a warp's, of a tile: 32 or 16
    static constexpr int kTile = kKeys * kWarps;
    static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(KV));
    static constexpr int kRowChunks = kRowBytes / 16;
    static constexpr int kTileBytes = kTile * kRowBytes;  // of K or V
    static constexpr int kStageBytes = 2 * kTileBytes;
    static constexpr int kQRowBytes = kWidth * static_cast<int>(sizeof(Q));
    static constexpr int kColumns = kWidth / 8;  // column tiles of out
    static constexpr bool kQInRegisters = kWidth <= 128;
    static constexpr int kOutStride = kWidth + 8;  // floats, of the rows the warps exchange
    static constexpr int kPartStride = kWidth + 4;
    static constexpr int kBitsOffset = 0;                         // uint32 [kStages][kWarps]
    static constexpr int kScratchOffset = kBitsOffset + 128;      // scans and broadcasts
    static constexpr int kRequestsOffset = kScratchOffset + 128;  // int [kThreads][4]
    static constexpr int kScaleOffset =
        kRequestsOffset + kThreads * 16;  // float [kStages][2][kTile]
    static constexpr int kStageOffset = (kScaleOffset + kStages * 2 * kTile * 4 + 127) / 128 * 128;
    static constexpr int kQOffset = kStageOffset + kStages * kStageBytes;

    static size_t shared_bytes(int warps_m) {
        return static_cast<size_t>(kQOffset + 16 * warps_m * kQRowBytes);
    }
};

// fp16 weights times a small per-token scale would leave fp16's range: lift them to about 1, undo
// it in fp32.
template <class KV>
PW_DEVICE float scale_lift() {
    return 1.0f;
}
template <>
PW_DEVICE float scale_lift<Float8E4M3>() {
    return 512.0f;
}
template <>
PW_DEVICE float scale_lift<Float8E5M2>() {
    return 65536.0f;
}
template <>
PW_DEVICE float scale_lift<int8_t>() {
    return 128.0f;
}

// Where 16-byte chunk `chunk` of row `row` lies: eight rows of one chunk fall into eight different
// banks.
template <int kRowBytes>
PW_DEVICE int swizzle(int row, int chunk) {
    constexpr int kChunks = kRowBytes / 16;
    if constexpr (kChunks >= 8) {
        return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    } else {
        return row * kRowBytes + ((chunk ^ (row / (8 / kChunks) & (kChunks - 1))) << 4);
    }
}

template <class S, class Q, class KV>
struct AttentionBlock {
    const AttentionPlan& p;
    char* shared;
    int lane, warp;
    uint64_t policy;

    PW_DEVICE explicit AttentionBlock(const AttentionPlan& plan)
        : p(plan),
          shared(shared_memory()),
          lane(thread_index() % 32),
          warp(thread_index() / 32),
          policy(evict_first_policy()) {}

    PW_DEVICE uint32_t* key_bits(int stage, int warp_idx) const {
        return reinterpret_cast<uint32_t*>(shared + S::kBitsOffset) + stage * S::kWarps + warp_idx;
    }
    PW_DEVICE int64_t* scratch64() const {
        return reinterpret_cast<int64_t*>(shared + S::kScratchOffset);
    }
    PW_DEVICE int* scratch() const {
        return reinterpret_cast<int*>(shared + S::kScratchOffset + 64);
    }
    PW_DEVICE int* request_info(int i) const {
        return reinterpret_cast<int*>(shared + S::kRequestsOffset) + 4 * i;
    }
    // Per-token scales of K (0) or V (1).
    PW_DEVICE float* key_scale(int stage, int which, int key) const {
        return reinterpret_cast<float*>(shared + S::kScaleOffset) + (stage * 2 + which) * S::kTile +
               key;
    }
    PW_DEVICE char* tile(int stage, int which) const {
        return shared + S::kStageOffset + stage * S::kStageBytes + which * S::kTileBytes;
    }
    PW_DEVICE char* q_rows() const { return shared + S::kQOffset; }

    // Warps that read each other's keys wait for each other.
    PW_DEVICE void sync_sharers() const {
        if (p.warps_m == 1) {
            sync_warp();
        } else {
            sync_block();
        }
    }

    // ------------------------------------------------------------------------------------ work

    PW_DEVICE void run() {
        int64_t total = 0, units = 0,
                after = 0;  // of all requests; of this thread's last; up to and with it
        int rows_end = 0;
        for (int base = 0; base < p.batch_size; base += S::kThreads) {
            describe(base, rows_end, units);
            int64_t sum;
            after = total + scan_sum<S::kThreads>(units, scratch64(), sum);
            total += sum;
            report_requests(base);
            write_empty_requests(base);
        }
        for (int64_t row = rows_end + int64_t(block_x()); row < p.num_tokens; row += grid_x()) {
            write_empty_row(static_cast<int>(row));
        }
        if (total == 0) return;
        const int64_t share = (total + grid_x() - 1) / grid_x();
        const int64_t begin = share * block_x();
        int64_t end = begin + share;
        if (end > total) end = total;
        if (begin >= end) return;

        int base = 0;
        if (p.batch_size > S::kThreads) base = seek(begin, units, after);
        // the one thread whose request unit `begin` belongs to tells the others
        if (after - units <= begin && begin < after) {
            store_shared(scratch64(), after - units);
            store_shared(scratch(), thread_index());
        }
        sync_block();
        const int first = load_shared(scratch());
        int request = base + first, row_begin = load_shared(request_info(first));
        int64_t prefix = load_shared(scratch64());  // units before the request
        RequestWork w = request_work(p, request, row_begin, next_row(row_begin, request), S::kTile);
        for (int64_t unit = begin; unit < end;) {
            while (unit >= prefix + w.total_units(p.num_kv_heads)) {
                prefix += w.total_units(p.num_kv_heads);
                ++request;
                w = request_work(p, request, w.row_end, next_row(w.row_end, request), S::kTile);
            }
            Segment s;
            unit += cut_segment(p, w, request, prefix, unit, end, share, s);
            attend(w, s);
        }
    }

    // Describes requests again, up to those among which unit `begin` lies; returns the first of
    // these.
    PW_DEVICE int seek(int64_t begin, int64_t& units, int64_t& after) {
        int64_t before = 0;
        int rows_end = 0;
        for (int base = 0;; base += S::kThreads) {
            int64_t sum;
            describe(base, rows_end, units);
            after = before + scan_sum<S::kThreads>(units, scratch64(), sum);
            if (begin < before + sum) return base;
            before += sum;
        }
    }

    PW_DEVICE int next_row(int row_begin, int request) const {
        const int end = row_offset(p, request + 1);
        return end > row_begin ? end : row_begin;
    }

    // The next kThreads requests, one a thread, into shared memory. `rows_end`: largest row offset
    // so far.
    PW_DEVICE void describe(int base, int& rows_end, int64_t& units) {
        const int request = base + thread_index();
        const bool exists = request < p.batch_size;
        int end = exists ? row_offset(p, request + 1) : 0;
        const int before = rows_end;
        int largest = before;
        const int own_end = scan_max<S::kThreads>(end, scratch(), largest);
        end = own_end > before ? own_end : before;
        // rows begin where the largest earlier offset ends
        int* info = request_info(thread_index());
        store_shared(info + 1, end);
        sync_block();
        const int begin =
            thread_index() == 0 ? before : load_shared(request_info(thread_index() - 1) + 1);
        units = 0;
        int flags = 0;
        if (exists) {
            const RequestWork w = request_work(p, request, begin, end, S::kTile);
            units = w.total_units(p.num_kv_heads);
            flags = w.bad_seq_len | (w.too_long << 1);
        }
        store_shared(info, begin);
        store_shared(info + 2, units > 0 ? 1 : 0);
        store_shared(info + 3, flags);
        sync_block();
        rows_end = largest;
    }

    PW_DEVICE void report_requests(int base) const {
        const int request = base + thread_index();
        if (block_x() != 0 || request >= p.batch_size) return;
        const bool decodes = p.cu_seqlens_q == nullptr;
        const int flags = load_shared(request_info(thread_index()) + 3);
        if (flags & 1) {
            record_error(p.error_word,
                         decodes ? ErrorKind::kDecodeSeqLen : ErrorKind::kPrefillSeqLen, request,
                         0);
        }
        if (flags & 2) record_error(p.error_word, ErrorKind::kPrefillMaxQLen, request, 0);
        if (decodes) return;
        const int offset = load_global(p.cu_seqlens_q + request + 1);
        const int before = request == 0 ? 0 : load_global(p.cu_seqlens_q + request);
        if (offset < before || offset < 0 || offset > p.num_tokens) {
            record_error(p.error_word, ErrorKind::kPrefillCuSeqlensQ, request + 1, 0);
        }
    }

    PW_DEVICE void write_empty_requests(int base) const {
        const int count = p.batch_size - base < S::kThreads ? p.batch_size - base : S::kThreads;
        // request r is block r % grid's; the first of its own among these:
        const int grid = static_cast<int>(grid_x()), own = static_cast<int>(block_x());
        for (int i = (own - base % grid + grid) % grid; i < count; i += grid) {
            if (load_shared(request_info(i) + 2)) continue;
            const int end = load_shared(request_info(i) + 1);
            for (int row = load_shared(request_info(i)); row < end; ++row) write_empty_row(row);
        }
        sync_block();
    }

    PW_DEVICE void write_empty_row(int row) const {
        const int heads = p.num_kv_heads * p.group_size;
        for (int i = thread_index(); i < heads * p.v.width; i += S::kThreads) {
            store_out(row, i / p.v.width, i % p.v.width, 0.0f);
        }
        if (p.lse == nullptr) return;
        for (int h = thread_index(); h < heads; h += S::kThreads) {
            store_lse(row, h, p.sinks ? load_global(p.sinks + h * p.sinks_stride) : -infinity());
        }
    }

    PW_DEVICE void store_lse(int row, int head, float lse) const {
        store_global(p.lse + row * p.lse_stride_row + head * p.lse_stride_head, lse);
    }
    PW_DEVICE void store_out(int row, int head, int column, float x) const {
        const int64_t at = row * p.out_stride_row + head * p.out_stride_head + column;
        if (p.out_float32) {
            store_global(reinterpret_cast<float*>(p.out) + at, x);
        } else {
            Q y;
            from_float(x, y);
            store_global(reinterpret_cast<Q*>(p.out) + at, y);
        }
    }

    // --------------------------------------------------------------------------------- loading

    struct Page {
        int page;    // -1: nothing to read for this lane's key
        int offset;  // inside the page
    };

    // The page of this lane's key of tile `i`, asked for one tile before its copies are issued.
    PW_DEVICE Page fetch_page(const RequestWork& w, const Segment& s, int i) const {
        const int key = s.key_begin + i * S::kTile + warp * S::kKeys + lane % S::kKeys;
        Page r{-1, 0};
        if (key >= s.key_end || key < w.first_key) return r;
        const int entry =
            static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(p.page_size));
        r.offset = key - entry * p.page_size;
        r.page = load_global(p.page_table + s.request * p.table_stride + entry);
        if (r.page < 0 || r.page >= p.num_pages) {
            r.page = -1;
            if (lane < S::kKeys) {
                record_error(p.error_word,
                             p.cu_seqlens_q ? ErrorKind::kPrefillPage : ErrorKind::kDecodePage,
                             s.request, entry);
            }
        }
        return r;
    }

    PW_DEVICE void issue(const Segment& s, int i, int num_tiles, Page at) const {
        if (i < num_tiles) {
            const int stage = i % S::kStages;
            const uint32_t bits =
                ballot(at.page >= 0) & static_cast<uint32_t>((uint64_t(1) << S::kKeys) - 1);
            if (lane == 0) store_shared(key_bits(stage, warp), bits);
            issue_rows(p.k, s.head, tile(stage, 0), at);
            issue_rows(p.v, s.head, tile(stage, 1), at);
            issue_scales(p.k.scale, s.head, stage, 0, at);
            issue_scales(p.v.scale, s.head, stage, 1, at);
        }
        commit_copies();
    }

    PW_DEVICE void issue_rows(const AttentionCache& cache, int head, char* to, Page at) const {
        const int64_t own = at.page < 0
                                ? -1
                                : at.page * cache.stride_page + at.offset * cache.stride_token +
                                      head * cache.stride_head;
        const int row_bytes = cache.width * static_cast<int>(sizeof(KV));
        const int chunks = (row_bytes + 63) / 64 * 4;  // tensor core steps read four at a time
        PW_UNROLL
        for (int j = 0; j < S::kKeys * S::kRowChunks; j += 32) {
            const int row = (j + lane) / S::kRowChunks, chunk = (j + lane) % S::kRowChunks;
            const int64_t offset = shuffle(own, row);
            if (chunk >= chunks) continue;
            char* target = to + swizzle<S::kRowBytes>(warp * S::kKeys + row, chunk);
            int bytes = offset < 0 ? 0 : row_bytes - chunk * 16;
            bytes = bytes < 0 ? 0 : bytes > 16 ? 16 : bytes;
            const char* source = cache.data + (bytes > 0 ? offset + chunk * 16 : 0);
            if (cache.aligned) {
                copy_async_16(target, source, bytes, policy);
            } else {
                copy_slowly(target, source, bytes);
            }
        }
    }

    // Rows that do not start on 16 bytes: element by element.
    PW_DEVICE void copy_slowly(char* target, const char* source, int bytes) const {
        constexpr int kCount = 16 / static_cast<int>(sizeof(KV));
        union {
            Vec16 whole;
            KV element[kCount];
        } chunk;
        chunk.whole = Vec16{};
        PW_UNROLL
        for (int e = 0; e < kCount; ++e) {
            if (e * static_cast<int>(sizeof(KV)) < bytes) {
                chunk.element[e] = load_global(reinterpret_cast<const KV*>(source) + e);
            }
        }
        store_shared(reinterpret_cast<Vec16*>(target), chunk.whole);
    }

    PW_DEVICE void issue_scales(const AttentionScale& scale, int head, int stage, int which,
                                Page at) const {
        if (scale.form != ScaleForm::kTokenHead || lane >= S::kKeys) return;
        const float* source = scale.data;
        if (at.page >= 0) {
            source += at.page * scale.stride_page + at.offset * scale.stride_token +
                      head * scale.stride_head;
        }
        copy_async_4(key_scale(stage, which, warp * S::kKeys + lane), source, at.page >= 0 ? 4 : 0);
    }

    // This block's query rows, zeros where there is none. For an 8-bit cache the elements of each
    // 16 are reordered, so that one 4-byte piece of a K row is what the tensor core step wants of
    // it.
    PW_DEVICE void load_q(const RequestWork& w, const Segment& s) const {
        constexpr int kCount = 16 / static_cast<int>(sizeof(Q));
        constexpr int kChunks = S::kWidth / kCount;
        for (int i = thread_index(); i < p.chunk_rows * kChunks; i += S::kThreads) {
            const int r = i / kChunks, chunk = i % kChunks, d = chunk * kCount;
            const int packed = s.chunk * p.chunk_rows + r;
            const int token = packed / p.group_size;
            union {
                Vec16 whole;
                Q element[kCount];
            } x;
            x.whole = Vec16{};
            if (token < w.q_len) {
                const int head = s.head * p.group_size + packed - token * p.group_size;
                const Q* row = reinterpret_cast<const Q*>(p.q) +
                               (w.row_begin + token) * p.q_stride_row + head * p.q_stride_head + d;
                if (p.q_aligned && d + kCount <= p.k.width) {
                    x.whole = load_global(reinterpret_cast<const Vec16*>(row));
                } else {
                    PW_UNROLL
                    for (int e = 0; e < kCount; ++e) {
                        if (d + e < p.k.width) x.element[e] = load_global(row + e);
                    }
                }
            }
            if constexpr (S::kQuantised) {
                // of the 8 pairs in 16 elements, even ones go to the first chunk, odd ones to the
                // second
                const int at = chunk % 2 * 8;
                store_q(r, chunk & ~1, at, Vec8{{x.whole.x[0], x.whole.x[2]}});
                store_q(r, chunk | 1, at, Vec8{{x.whole.x[1], x.whole.x[3]}});
            } else {
                store_q(r, chunk, 0, x.whole);
            }
        }
    }

    template <class V>
    PW_DEVICE void store_q(int row, int chunk, int byte, V value) const {
        char* at = q_rows() + swizzle<S::kQRowBytes>(row, chunk) + byte;
        store_shared(reinterpret_cast<V*>(at), value);
    }

    // ------------------------------------------------------------------------------- attention

    // One thread's share of a 16-row state: rows g and g + 8 (g = lane / 4).
    struct State {
        float max[2], sum[2];
        float out[S::kColumns][4];  // columns of an 8-wide tile: two of row g, two of row g + 8
    };

    struct Rows {  // what masks and biases need to know of rows g and g + 8
        int low[2], high[2], position[2];
        float slope[2];
    };

    PW_DEVICE Rows rows_of(const RequestWork& w, const Segment& s, int m) const {
        Rows rows;
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int packed = s.chunk * p.chunk_rows + m * 16 + lane / 4 + 8 * half;
            const int token = packed / p.group_size,
                      head = s.head * p.group_size + packed % p.group_size;
            const int position = w.seq_len - w.q_len + token;
            int low = 0, high = w.seq_len - 1;
            if (p.window_left >= 0 && position - p.window_left > low)
                low = position - p.window_left;
            if (p.causal && position < high) high = position;
            if (p.window_right >= 0 && int64_t(position) + p.window_right < high)
                high = position + p.window_right;
            rows.low[half] = low;
            rows.high[half] = token < w.q_len ? high : -1;
            rows.position[half] = position;
            rows.slope[half] = 0.0f;
            if (p.alibi_slopes && token < w.q_len) {
                rows.slope[half] = load_global(p.alibi_slopes + s.request * p.alibi_stride_request +
                                               head * p.alibi_stride_head);
            }
        }
        return rows;
    }

    PW_DEVICE static float shared_scale(const AttentionScale& scale, int request, int head) {
        if (scale.form == ScaleForm::kValue) return scale.value;
        if (scale.form == ScaleForm::kPerHead) {
            return load_global(scale.data + request * scale.stride_request +
                               head * scale.stride_head);
        }
        return 1.0f;
    }

    PW_DEVICE void attend(const RequestWork& w, const Segment& s) {
        load_q(w, s);
        sync_block();
        const int m = warp % p.warps_m, key_group = warp / p.warps_m;
        const int num_tiles = (s.key_end - s.key_begin + S::kTile - 1) / S::kTile;

        State state;
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.max[half] = -infinity();
            state.sum[half] = 0.0f;
        }
        PW_UNROLL
        for (int n = 0; n < S::kColumns; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) state.out[n][i] = 0.0f;
        }
        const Rows rows = rows_of(w, s, m);
        const float scale = p.softmax_scale * shared_scale(p.k.scale, s.request, s.head);
        uint32_t q[S::kQInRegisters ? S::kWidth / 16 : 1][4];
        if constexpr (S::kQInRegisters) {
            PW_UNROLL
            for (int step = 0; step < S::kWidth / 16; ++step) load_q_step(q[step], m, step);
        }

        Page at = fetch_page(w, s, 0);
        PW_UNROLL
        for (int i = 0; i < S::kStages - 1; ++i) {
            const Page next = fetch_page(w, s, i + 1);
            issue(s, i, num_tiles, at);
            at = next;
        }
        PW_NO_UNROLL
        for (int i = 0; i < num_tiles; ++i) {
            const Page next = fetch_page(w, s, i + S::kStages);
            wait_copies<S::kStages - 2>();
            sync_sharers();  // tile i is there for its readers, and nobody reads tile i - 1 any
                             // more
            issue(s, i + S::kStages - 1, num_tiles, at);
            at = next;
            // with one warp for the rows, its keys are those it copied
            PW_NO_UNROLL
            for (int part = 0; part < p.warps_m; ++part) {
                const int first = key_group * p.warps_m + part;  // in units of kKeys
                step(state, rows, q, i % S::kStages, first,
                     s.key_begin + i * S::kTile + first * S::kKeys, m, scale);
            }
        }
        wait_copies<0>();
        sync_block();
        finish(w, s, state, m, key_group);
        sync_block();
    }

    PW_DEVICE void load_q_step(uint32_t (&a)[4], int m, int step) const {
        load_matrices(a,
                      q_rows() + swizzle<S::kQRowBytes>(m * 16 + lane % 16, 2 * step + lane / 16));
    }

    // kKeys keys of one tile against 16 rows.
    template <int kSteps>
    PW_DEVICE void step(State& state, const Rows& rows, const uint32_t (&q)[kSteps][4], int stage,
                        int group, int first_key, int m, float scale) {
        constexpr int kTiles = S::kKeys / 8;
        float x[kTiles][4];
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) x[n][i] = 0.0f;
        }
        logits(x, q, tile(stage, 0), group * S::kKeys, m);
        mask_and_scale(x, rows, stage, group, first_key, scale);
        float rescale[2];
        softmax(x, state, rescale);
        if (ballot(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; ++n) {
                PW_UNROLL
                for (int i = 0; i < 4; ++i) state.out[n][i] *= rescale[i / 2];
            }
        }
        if (p.v.scale.form == ScaleForm::kTokenHead) {
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int key = group * S::kKeys + n * 8 + lane % 4 * 2 + i % 2;
                    x[n][i] *= load_shared(key_scale(stage, 1, key)) * scale_lift<KV>();
                }
            }
        }
        accumulate(x, state, tile(stage, 1), group * S::kKeys);
    }

    // x[row][key] of this thread: rows g, g + 8; keys 8n + 2t, 8n + 2t + 1 (t = lane % 4).
    template <int kTiles, int kSteps>
    PW_DEVICE void logits(float (&x)[kTiles][4], const uint32_t (&q)[kSteps][4], const char* k,
                          int first, int m) const {
        constexpr int kPerLoad = S::kQuantised ? 4 : 2;  // 16-wide steps in four chunks of a K row
        PW_UNROLL
        for (int load = 0; load < S::kWidth / 16 / kPerLoad; ++load) {
            if (load * kPerLoad * 16 >= p.k.width) break;
            uint32_t a[kPerLoad][4];
            PW_UNROLL
            for (int i = 0; i < kPerLoad; ++i) {
                if constexpr (S::kQInRegisters) {
                    PW_UNROLL
                    for (int j = 0; j < 4; ++j) a[i][j] = q[load * kPerLoad + i][j];
                } else {
                    load_q_step(a[i], m, load * kPerLoad + i);
                }
            }
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                uint32_t b[4];
                load_matrices(
                    b, k + swizzle<S::kRowBytes>(first + n * 8 + lane % 8, load * 4 + lane / 8));
                PW_UNROLL
                for (int i = 0; i < kPerLoad; ++i) {
                    if constexpr (S::kQuantised) {
                        multiply_accumulate<Operand<Q>::kBFloat16>(
                            x[n], a[i], widen<Q>(b[i] & 0xffff, KV{}), widen<Q>(b[i] >> 16, KV{}));
                    } else {
                        multiply_accumulate<Operand<Q>::kBFloat16>(x[n], a[i], b[2 * i],
                                                                   b[2 * i + 1]);
                    }
                }
            }
        }
    }

    template <int kTiles>
    PW_DEVICE void mask_and_scale(float (&x)[kTiles][4], const Rows& rows, int stage, int group,
                                  int first_key, float scale) const {
        const uint32_t bits = load_shared(key_bits(stage, group));
        const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr;
        const bool per_token = p.k.scale.form == ScaleForm::kTokenHead;
        PW_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int inside = n * 8 + lane % 4 * 2 + i % 2, key = first_key + inside,
                          half = i / 2;
                float y = x[n][i];
                if (per_token) y *= load_shared(key_scale(stage, 0, group * S::kKeys + inside));
                if (plain) {
                    y *= scale * kLog2E;
                } else {
                    y *= scale;
                    if (p.softcap > 0.0f) y = p.softcap * tanh_exact(divide(y, p.softcap));
                    const int distance = rows.position[half] - key;
                    y -= rows.slope[half] * static_cast<float>(distance < 0 ? -distance : distance);
                    y *= kLog2E;
                }
                const bool visible =
                    (bits >> inside & 1) && key >= rows.low[half] && key <= rows.high[half];
                x[n][i] = visible ? y : -infinity();
            }
        }
    }

    // Logits (base 2) to weights against the running maximum. The sums stay per thread until
    // finish().
    template <int kTiles>
    PW_DEVICE void softmax(float (&x)[kTiles][4], State& state, float (&rescale)[2]) const {
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = state.max[half];
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                largest = fmaxf(largest, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            // no key seen yet: any finite base keeps exp2(-inf - base) = 0
            const float base = largest == -infinity() ? 0.0f : largest;
            rescale[half] = exp2_fast(state.max[half] - base);
            state.max[half] = largest;
            float sum = 0.0f;
            PW_UNROLL
            for (int n = 0; n < kTiles; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    x[n][2 * half + i] = exp2_fast(x[n][2 * half + i] - base);
                    sum += x[n][2 * half + i];
                }
            }
            state.sum[half] = state.sum[half] * rescale[half] + sum;
        }
    }

    template <int kTiles>
    PW_DEVICE void accumulate(const float (&x)[kTiles][4], State& state, const char* v,
                              int first) const {
        uint32_t a[kTiles / 2][4];
        PW_UNROLL
        for (int step = 0; step < kTiles / 2; ++step) {
            PW_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&pair)[4] = x[2 * step + i / 2];
                a[step][i] = Operand<Q>::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
        }
        constexpr bool kBFloat16 = Operand<Q>::kBFloat16;
        if constexpr (S::kQuantised) {
            // a chunk holds 16 columns; transposing byte pairs gives columns 2g and 2g + 1 of keys
            // 2t and 2t + 1
            PW_UNROLL
            for (int chunk = 0; chunk < S::kRowChunks; ++chunk) {
                if (chunk * 16 >= p.v.width) break;
                uint32_t r[4];
                load_matrices_transposed(r, v + swizzle<S::kRowBytes>(first + lane, chunk));
                uint32_t even[4], odd[4];
                PW_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const uint32_t sorted = permute_bytes(r[i], 0, 0x3120);
                    even[i] = widen<Q>(sorted & 0xffff, KV{});
                    odd[i] = widen<Q>(sorted >> 16, KV{});
                }
                PW_UNROLL
                for (int step = 0; step < 2; ++step) {
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk], a[step], even[2 * step],
                                                   even[2 * step + 1]);
                    multiply_accumulate<kBFloat16>(state.out[2 * chunk + 1], a[step], odd[2 * step],
                                                   odd[2 * step + 1]);
                }
            }
        } else {
            PW_UNROLL
            for (int n = 0; n < S::kColumns; n += 2) {
                if (n * 8 >= p.v.width) break;
                uint32_t b[4];
                load_matrices_transposed(
                    b, v + swizzle<S::kRowBytes>(first + lane % 16, n + lane / 16));
                multiply_accumulate<kBFloat16>(state.out[n], a[0], b[0], b[1]);
                multiply_accumulate<kBFloat16>(state.out[n + 1], a[0], b[2], b[3]);
            }
        }
    }

    // The column of out[n][i], and of out[n][i + 2].
    PW_DEVICE int column_of(int n, int i) const {
        const int column = lane % 4 * 2 + i;
        if constexpr (S::kQuantised) return n / 2 * 16 + 2 * column + n % 2;
        return n * 8 + column;
    }

    // --------------------------------------------------------------------------------- merging

    // The warps' states become one part; a part that is not all of its item waits in memory for the
    // others.
    PW_DEVICE void finish(const RequestWork& w, const Segment& s, State& state, int m,
                          int key_group) {
        float* outs =
            reinterpret_cast<float*>(shared + S::kStageOffset);  // [kWarps * 16][kOutStride]
        float* maxima = outs + S::kWarps * 16 * S::kOutStride;   // [kWarps * 16]
        float* sums = maxima + S::kWarps * 16;
        static_assert((S::kWarps * 16 * (S::kOutStride + 2)) * 4 <= S::kStages * S::kStageBytes,
                      "the exchanged states fit into the stages");
        PW_UNROLL
        for (int half = 0; half < 2; ++half) {
            state.sum[half] += shuffle_xor(state.sum[half], 1);
            state.sum[half] += shuffle_xor(state.sum[half], 2);
            // rows of the block, key group after key group
            const int row = (key_group * p.warps_m + m) * 16 + lane / 4 + 8 * half;
            if (lane % 4 == 0) {
                store_shared(maxima + row, state.max[half]);
                store_shared(sums + row, state.sum[half]);
            }
            PW_UNROLL
            for (int n = 0; n < S::kColumns; ++n) {
                PW_UNROLL
                for (int i = 0; i < 2; ++i) {
                    store_shared(outs + row * S::kOutStride + column_of(n, i),
                                 state.out[n][2 * half + i]);
                }
            }
        }
        sync_block();
        const int valid = valid_rows(w, s), groups = S::kWarps / p.warps_m;
        const auto part_max = [&](int row, int i) {
            return load_shared(maxima + i * p.chunk_rows + row);
        };
        const auto part_sum = [&](int row, int i) {
            return load_shared(sums + i * p.chunk_rows + row);
        };
        const auto part_out = [&](int row, int i, int column, float (&x)[4]) {
            const float* from = outs + (i * p.chunk_rows + row) * S::kOutStride + column;
            PW_UNROLL
            for (int e = 0; e < 4; ++e) x[e] = load_shared(from + e);
        };
        if (s.num_parts == 1) {
            merge_rows(valid, groups, part_max, part_sum, part_out,
                       [&](int row, int column, float max, float sum, const float (&x)[4]) {
                           store_result(w, s, row, column, max, sum, x);
                       });
            return;
        }
        float* own = p.partial + s.slot * p.chunk_rows * S::kPartStride;
        merge_rows(valid, groups, part_max, part_sum, part_out,
                   [&](int row, int column, float max, float sum, const float (&x)[4]) {
                       float* to = own + row * S::kPartStride;
                       store_global(reinterpret_cast<Vec16*>(to + column),
                                    Vec16{{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]),
                                           float_bits(x[3])}});
                       if (column == 0) {
                           store_global(to + S::kWidth, max);
                           store_global(to + S::kWidth + 1, sum);
                       }
                   });
        fence_device();
        sync_block();
        if (thread_index() == 0) {
            const bool last = atomic_add(p.counters + s.counter, 1) == s.num_parts - 1;
            if (last) store_global(p.counters + s.counter, 0);
            store_shared(scratch(), last ? 1 : 0);
        }
        sync_block();
        if (!load_shared(scratch())) return;
        fence_device();
        const auto slot = [&](int row, int i) {
            return p.partial + (s.slot_of(i) * p.chunk_rows + row) * S::kPartStride;
        };
        merge_rows(
            valid, s.num_parts,
            [&](int row, int i) { return load_global_fresh(slot(row, i) + S::kWidth); },
            [&](int row, int i) { return load_global_fresh(slot(row, i) + S::kWidth + 1); },
            [&](int row, int i, int column, float (&x)[4]) {
                const Vec16 four =
                    load_global_fresh(reinterpret_cast<const Vec16*>(slot(row, i) + column));
                PW_UNROLL
                for (int e = 0; e < 4; ++e) x[e] = float_from_bits(four.x[e]);
            },
            [&](int row, int column, float max, float sum, const float (&x)[4]) {
                store_result(w, s, row, column, max, sum, x);
            });
    }

    PW_DEVICE int valid_rows(const RequestWork& w, const Segment& s) const {
        const int left = w.q_len * p.group_size - s.chunk * p.chunk_rows;
        return left < p.chunk_rows ? left : p.chunk_rows;
    }

    // Merges `count` states of each row in their order, four columns a thread.
    template <class Max, class Sum, class Out, class Store>
    PW_DEVICE void merge_rows(int valid, int count, Max max_of, Sum sum_of, Out out_of,
                              Store store) const {
        const int quads = (p.v.width + 3) / 4;
        for (int i = thread_index(); i < valid * quads; i += S::kThreads) {
            const int row = i / quads, column = i % quads * 4;
            float largest = -infinity();
            PW_UNROLL_BY(4)
            for (int j = 0; j < count; ++j) largest = fmaxf(largest, max_of(row, j));
            const float base = largest == -infinity() ? 0.0f : largest;
            float sum = 0.0f, x[4] = {};
            PW_UNROLL_BY(4)
            for (int j = 0; j < count; ++j) {
                const float weight = exp2_fast(max_of(row, j) - base);
                float part[4];
                out_of(row, j, column, part);
                sum += weight * sum_of(row, j);
                PW_UNROLL
                for (int e = 0; e < 4; ++e) x[e] += weight * part[e];
            }
            store(row, column, largest, sum, x);
        }
    }

    // The sink joins, the sum divides, V's scale multiplies.
    PW_DEVICE void store_result(const RequestWork& w, const Segment& s, int row, int column,
                                float max, float sum, const float (&x)[4]) const {
        const int packed = s.chunk * p.chunk_rows + row;
        const int q_row = w.row_begin + packed / p.group_size;
        const int head = s.head * p.group_size + packed % p.group_size;
        float shrink = 1.0f;
        if (p.sinks) {
            const float sink = load_global(p.sinks + head * p.sinks_stride) * kLog2E;
            const float larger = fmaxf(max, sink), base = larger == -infinity() ? 0.0f : larger;
            shrink = exp2_fast(max - base);
            sum = sum * shrink + exp2_fast(sink - base);
            max = larger;
        }
        float factor = sum > 0.0f ? divide(shrink, sum) : 0.0f;
        factor *= p.v.scale.form == ScaleForm::kTokenHead
                      ? 1.0f / scale_lift<KV>()
                      : shared_scale(p.v.scale, s.request, s.head);
        PW_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column + e < p.v.width) store_out(q_row, head, column + e, x[e] * factor);
        }
        if (column == 0 && p.lse) {
            store_lse(q_row, head, sum > 0.0f ? (max + log2_fast(sum)) * kLn2 : -infinity());
        }
    }
};

template <class Q, class KV, int kWidth>
PW_KERNEL((Shape<Q, KV, kWidth>::kThreads), (Shape<Q, KV, kWidth>::kMinBlocks))
void attention_kernel(const AttentionPlan p) {
    AttentionBlock<Shape<Q, KV, kWidth>, Q, KV>(p).run();
}

}  // namespace pagewire
