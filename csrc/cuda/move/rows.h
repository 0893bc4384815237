// Where a row lies on either side: found once for all layers and for K and V.
#pragma once

#include "cuda/device/memory.h"
#include "cuda/error_word.h"
#include "cuda/move/plan.h"

namespace pagewire::moving {

enum class Fate : int { kMove, kZero, kSkip };

struct Row {
    Fate fate;
    uint32_t token, head;
    int64_t page, offset;  // of the slot
};

// The rows of these indices, kSkip for those past the end. `reports`: bad slots are recorded.
template <int kRows>
PW_DEVICE void locate(const Rows& rows, const uint32_t (&index)[kRows], Row (&row)[kRows], bool reports) {
    PW_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const uint32_t r = index[i] < rows.num_rows ? index[i] : rows.num_rows - 1;
        const uint32_t major = rows.fastest.quotient(r), minor = r - major * rows.fastest.divisor;
        row[i].token = rows.head_fastest ? major : minor;
        row[i].head = rows.head_fastest ? minor : major;
    }
    int64_t slot[kRows];  // all on their way before the first is looked at
    if (rows.slots.is_int64) {
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            slot[i] = load_global(static_cast<const int64_t*>(rows.slots.data) + row[i].token * rows.slots.stride);
        }
    } else {
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            slot[i] = load_global(static_cast<const int32_t*>(rows.slots.data) + row[i].token * rows.slots.stride);
        }
    }
    PW_UNROLL
    for (int i = 0; i < kRows; ++i) {
        const bool exists = index[i] < rows.num_rows;
        const bool bad = static_cast<uint64_t>(slot[i]) >= static_cast<uint64_t>(rows.num_slots);
        row[i].fate = !exists || (bad && !rows.slots_on_source) ? Fate::kSkip : bad ? Fate::kZero : Fate::kMove;
        if (bad) {
            const bool asked_for = slot[i] < 0 && rows.skip_negative;
            if (exists && reports && row[i].head == 0 && !asked_for) {
                record_error(rows.error_word, rows.error_kind, 0, row[i].token);
            }
            slot[i] = 0;
        }
    }
    if (rows.num_slots <= int64_t(1) << 31) {
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const uint32_t of = static_cast<uint32_t>(slot[i]), page = rows.page_size32.quotient(of);
            row[i].page = page;
            row[i].offset = of - page * rows.page_size32.divisor;
        }
    } else {
        PW_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const uint64_t of = static_cast<uint64_t>(slot[i]), page = rows.page_size.quotient(of);
            row[i].page = static_cast<int64_t>(page);
            row[i].offset = static_cast<int64_t>(of - page * rows.page_size.divisor);
        }
    }
}

// Of a row from the pointers of its plane.
struct Offsets {
    int64_t source, target;
};

// In bytes.
PW_DEVICE Offsets offsets_of(const Rows& rows, const Move& part, const Row& r) {
    const MoveSide& paged = rows.slots_on_source ? part.source : part.target;
    const MoveSide& dense = rows.slots_on_source ? part.target : part.source;
    const int64_t of_slot = r.page * paged.stride_page + r.offset * paged.stride_token + r.head * paged.stride_head;
    const int64_t of_token = r.token * dense.stride_token + r.head * dense.stride_head;
    return rows.slots_on_source ? Offsets{of_slot, of_token} : Offsets{of_token, of_slot};
}

// In scales.
PW_DEVICE Offsets scale_offsets_of(const Rows& rows, const Move& part, const Row& r) {
    const ScaleView& paged = rows.slots_on_source ? part.source.scale : part.target.scale;
    const ScaleView& dense = rows.slots_on_source ? part.target.scale : part.source.scale;
    const int64_t of_slot = r.page * paged.stride_page + r.offset * paged.stride_token + r.head * paged.stride_head;
    const int64_t of_token = r.token * dense.stride_token + r.head * dense.stride_head;
    return rows.slots_on_source ? Offsets{of_slot, of_token} : Offsets{of_token, of_slot};
}

}  // namespace pagewire::moving
