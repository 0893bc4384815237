// Which request a block begins with, and what nobody computes: empty requests, padding rows, errors.
#pragma once

#include "cuda/attention_block.h"

namespace pagewire {

template <class S, class Q, class KV>
struct AttentionRequests : AttentionBase<S, Q, KV> {
    using Below = AttentionBase<S, Q, KV>;
    using Below::Below;
    using Below::p;
    using Below::request_info;
    using Below::scratch;
    using Below::scratch64;
    using Below::store_lse;
    using Below::store_out;

    // Describes requests again, up to those among which unit `begin` lies; returns the first of these.
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

    // The next kThreads requests, one a thread, into shared memory. `rows_end`: largest row offset so far.
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
        const int begin = thread_index() == 0 ? before : load_shared(request_info(thread_index() - 1) + 1);
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
            record_error(p.error_word, decodes ? ErrorKind::kDecodeSeqLen : ErrorKind::kPrefillSeqLen, request, 0);
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
};

}  // namespace pagewire
