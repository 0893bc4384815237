// append, pack and unpack: rows of one head copied or converted, quantising by the one formula:
// fp32 IEEE division by the scale, round to nearest even, saturate. Included inside the anonymous
// namespace of a target.

// Largest finite magnitude.
inline float finite_amax(const float* row, int64_t width) {
    F top = zero();
    for (int64_t i = 0; i < width; i += kLanes) {
        const F size = abs(load_some(row + i, clip(width - i, 0, kLanes)));
        top = max(select(less(size, set1(infinity())), size, zero()), top);
    }
    return maximum(top);
}

// row / over, saturated, if the target is quantised; a plain cast otherwise.
template <class Target>
void quantise_row(const float* row, int64_t width, float over, Target* to) {
    constexpr float kLimit = QuantMax<Target>::value;
    for (int64_t i = 0; i < width; i += kLanes) {
        const int n = clip(width - i, 0, kLanes);
        F x = load_some(row + i, n);
        if constexpr (kLimit > 0.0f) {
            x = div(x, set1(over));
            x = min(set1(kLimit), max(set1(-kLimit), x));  // NaN stays
        }
        store_some(to + i, x, n);
    }
}

constexpr int64_t kTokensAhead = 2;  // fetched: slots follow no order that a processor could guess

struct Place {  // of a token on one side
    int64_t page, token;
};

inline char* row_of(const MoveParams::Side& side, Place at, int64_t head) {
    const int64_t element = at.page * side.stride_page + at.token * side.stride_token + head * side.stride_head;
    return side.data + element * item_size(side.dtype);
}

inline float* scale_of(const MoveParams::Side& side, Place at, int64_t head) {
    return side.scale.kind == ScaleKind::kNone ? nullptr : side.scale.at(at.page, at.token, head);
}

inline void convert_token(const MoveParams& p, Place from, Place to) {
    alignas(64) float row[kMaxWidth];
    for (int64_t head = 0; head < p.num_heads; ++head) {
        const float* source_scale = scale_of(p.source, from, head);
        load_row(p.source.dtype, row_of(p.source, from, head), p.width, row);
        if (source_scale != nullptr) {
            const F times = set1(*source_scale);
            for (int64_t i = 0; i < p.width; i += kLanes) store(row + i, mul(load(row + i), times));
        }
        float* target_scale = scale_of(p.target, to, head);
        float over = 1.0f;
        if (p.make_scale) {
            over = finite_amax(row, p.width) / quant_max(p.target.dtype);
            if (over == 0.0f) over = 1.0f;
            *target_scale = over;
        } else if (target_scale != nullptr) {
            over = *target_scale;
        }
        with_dtype(p.target.dtype, [&](auto tag) {
            using Target = typename decltype(tag)::type;
            quantise_row(row, p.width, over, reinterpret_cast<Target*>(row_of(p.target, to, head)));
        });
    }
}

inline void copy_bytes(char* to, const char* from, int64_t bytes, bool stream) {
    if (!stream || (reinterpret_cast<uintptr_t>(to) | uintptr_t(bytes)) % 64 != 0) {
        __builtin_memcpy(to, from, bytes);
        return;
    }
    for (int64_t i = 0; i < bytes; i += 64) stream64(to + i, from + i);
}

// The heads of a token that lie in a row, and how often.
struct Runs {
    int64_t num, bytes;
    Runs(const MoveParams& p, bool together) {
        const int64_t head = p.width * item_size(p.source.dtype);
        num = together ? 1 : p.num_heads;
        bytes = together ? head * p.num_heads : head;
    }
};

inline void copy_token(const MoveParams& p, Place from, Place to) {
    const Runs runs(p, p.source.stride_head == p.width && p.target.stride_head == p.width);
    for (int64_t head = 0; head < runs.num; ++head)
        copy_bytes(row_of(p.target, to, head), row_of(p.source, from, head), runs.bytes, p.stream);
    if (p.source.scale.kind == ScaleKind::kTokenHead) {
        for (int64_t head = 0; head < p.num_heads; ++head)
            *scale_of(p.target, to, head) = *scale_of(p.source, from, head);
    }
}

inline void fetch_token(const MoveParams& p, int64_t slot) {  // from its page
    const Place at{slot / p.page_size, slot % p.page_size};
    const Runs runs(p, p.source.stride_head == p.width);
    for (int64_t head = 0; head < runs.num; ++head) {
        const char* row = row_of(p.source, at, head);
        for (int64_t byte = 0; byte < runs.bytes; byte += 64) prefetch(row + byte);
    }
}

template <class Move>
void over_tokens(const MoveParams& p, int64_t begin, int64_t end, Move move) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = p.slots[i];
        if (slot < 0) continue;
        if (!p.to_slots && i + kTokensAhead < end) fetch_token(p, p.slots[i + kTokensAhead]);
        const Place in_pages{slot / p.page_size, slot % p.page_size}, in_rows{0, i};
        p.to_slots ? move(in_rows, in_pages) : move(in_pages, in_rows);
    }
}

void move_rows(const MoveParams& p, int64_t begin, int64_t end) {
    if (p.copy) {
        over_tokens(p, begin, end, [&](Place from, Place to) { copy_token(p, from, to); });
        stream_end();
    } else {
        over_tokens(p, begin, end, [&](Place from, Place to) { convert_token(p, from, to); });
    }
}
