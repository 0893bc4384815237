// Checks that keep memory safe: every page id, slot, length and row offset, before anything is written.
#pragma once

#include <stdexcept>
#include <string>

#include "pagewire/params.h"

namespace pagewire {

// Becomes pagewire.errors.BadIndexError.
struct BadIndex : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline int64_t row_begin(const AttentionParams& p, int64_t request) {
    return p.cu_seqlens_q.size == 0 ? request : request == 0 ? 0 : p.cu_seqlens_q[request];
}

inline void check_query_rows(const AttentionParams& p) {
    using std::to_string;
    if (p.cu_seqlens_q.size == 0) return;
    if (p.cu_seqlens_q[0] != 0) {
        throw BadIndex("prefill: cu_seqlens_q[0]: expected 0, got " + to_string(p.cu_seqlens_q[0]));
    }
    for (int64_t b = 0; b + 1 < p.cu_seqlens_q.size; ++b) {
        int64_t begin = p.cu_seqlens_q[b];
        int64_t end = p.cu_seqlens_q[b + 1];
        if (end < begin || end > p.q.num_rows) {
            throw BadIndex("prefill: cu_seqlens_q[" + to_string(b + 1) + "]: expected a value in [" + to_string(begin) +
                           ", " + to_string(p.q.num_rows) + "] (non-decreasing, at most num_tokens from q), got " +
                           to_string(end));
        }
        if (p.max_q_len > 0 && end - begin > p.max_q_len) {
            throw BadIndex("prefill: request " + to_string(b) + " has " + to_string(end - begin) +
                           " query rows, more than max_q_len=" + to_string(p.max_q_len));
        }
    }
}

inline void check_pages(const AttentionParams& p) {
    using std::to_string;
    const int64_t page_size = p.k.page_size;
    const int64_t num_pages = p.k.num_pages;
    const int64_t capacity = p.page_table.max_pages_per_seq * page_size;
    for (int64_t b = 0; b < p.page_table.batch_size; ++b) {
        const int64_t seq_len = p.seq_lens[b];
        if (seq_len < 0 || seq_len > capacity) {
            throw BadIndex(std::string(p.op) + ": seq_lens[" + to_string(b) + "]: expected a value in [0, " +
                           to_string(capacity) + "] (" + to_string(p.page_table.max_pages_per_seq) + " pages of " +
                           to_string(page_size) + ", from page_table and k_cache), got " + to_string(seq_len));
        }
        const int64_t first = first_key(seq_len, row_begin(p, b + 1) - row_begin(p, b), p.window_left);
        if (first >= seq_len) continue;
        for (int64_t i = first / page_size; i * page_size < seq_len; ++i) {
            const int64_t page = p.page_table.at(b, i);
            if (page < 0 || page >= num_pages) {
                throw BadIndex(std::string(p.op) + ": page_table[" + to_string(b) + ", " + to_string(i) +
                               "]: expected a page in [0, " + to_string(num_pages) +
                               ") (num_pages, from k_cache), got " + to_string(page));
            }
        }
    }
}

inline void check_slots(const MoveParams& p) {
    using std::to_string;
    for (int64_t i = 0; i < p.slots.size; ++i) {
        const int64_t slot = p.slots[i];
        if (slot >= p.num_slots || (slot < 0 && !p.is_append)) {
            throw BadIndex(std::string(p.op) + (p.is_append ? ": slot_mapping[" : ": slots[") + to_string(i) +
                           "]: expected a slot in [0, " + to_string(p.num_slots) + ") (num_pages * page_size), got " +
                           to_string(slot));
        }
    }
}

}  // namespace pagewire
