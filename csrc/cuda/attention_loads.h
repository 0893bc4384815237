// From pages to shared memory: asynchronous copies of K, V and their scales, and the query rows.
#pragma once

#include "cuda/attention_requests.h"

namespace pagewire {

template <class S, class Q, class KV>
struct AttentionLoads : AttentionRequests<S, Q, KV> {
    using Below = AttentionRequests<S, Q, KV>;
    using Below::Below;
    using Below::key_bits;
    using Below::key_scale;
    using Below::lane;
    using Below::p;
    using Below::policy;
    using Below::q_rows;
    using Below::tile;
    using Below::warp;

    struct Page {
        int page;    // -1: nothing to read for this lane's key
        int offset;  // inside the page
    };

    // The page of this lane's key of tile `i`, asked for one tile before its copies are issued.
    PW_DEVICE Page fetch_page(const RequestWork& w, const Segment& s, int i) const {
        const int key = s.key_begin + i * S::kTile + warp * S::kKeys + lane % S::kKeys;
        Page r{-1, 0};
        if (key >= s.key_end || key < w.first_key) return r;
        const int entry = static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(p.page_size));
        r.offset = key - entry * p.page_size;
        r.page = load_global(p.page_table + s.request * p.table_stride + entry);
        if (r.page < 0 || r.page >= p.num_pages) {
            r.page = -1;
            if (lane < S::kKeys) {
                record_error(p.error_word, p.cu_seqlens_q ? ErrorKind::kPrefillPage : ErrorKind::kDecodePage, s.request,
                             entry);
            }
        }
        return r;
    }

    PW_DEVICE void issue(const Segment& s, int i, int num_tiles, Page at) const {
        if (i < num_tiles) {
            const int stage = i % S::kStages;
            const uint32_t bits = ballot(at.page >= 0) & static_cast<uint32_t>((uint64_t(1) << S::kKeys) - 1);
            if (lane == 0) store_shared(key_bits(stage, warp), bits);
            issue_rows(p.k, s.head, tile(stage, 0), at);
            issue_rows(p.v, s.head, tile(stage, 1), at);
            issue_scales(p.k.scale, s.head, stage, 0, at);
            issue_scales(p.v.scale, s.head, stage, 1, at);
        }
        commit_copies();
    }

    PW_DEVICE void issue_rows(const AttentionCache& cache, int head, char* to, Page at) const {
        const int64_t own =
            at.page < 0 ? -1 : at.page * cache.stride_page + at.offset * cache.stride_token + head * cache.stride_head;
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

    PW_DEVICE void issue_scales(const ScaleView& scale, int head, int stage, int which, Page at) const {
        if (scale.kind != ScaleKind::kTokenHead || lane >= S::kKeys) return;
        const float* source = scale.data;
        if (at.page >= 0) {
            source += at.page * scale.stride_page + at.offset * scale.stride_token + head * scale.stride_head;
        }
        copy_async_4(key_scale(stage, which, warp * S::kKeys + lane), source, at.page >= 0 ? 4 : 0);
    }

    // This block's query rows, zeros where there is none. For an 8-bit cache the elements of each 16 are reordered, so
    // that one 4-byte piece of a K row is what the tensor core step wants of it.
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
                const Q* row = reinterpret_cast<const Q*>(p.q) + (w.row_begin + token) * p.q_stride_row +
                               head * p.q_stride_head + d;
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
                // of the 8 pairs in 16 elements, even ones go to the first chunk, odd ones to the second
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
};

}  // namespace pagewire
