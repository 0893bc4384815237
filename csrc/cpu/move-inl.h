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

// row / divisor, saturated, if the target is quantised; a plain cast otherwise.
template <class Target>
void quantise_row(const float* row, int64_t width, float divisor, Target* to) {
    constexpr float kLimit = QuantMax<Target>::value;
    for (int64_t i = 0; i < width; i += kLanes) {
        const int n = clip(width - i, 0, kLanes);
        F x = load_some(row + i, n);
        if constexpr (kLimit > 0.0f) {
            x = div(x, set1(divisor));
            x = min(set1(kLimit), max(set1(-kLimit), x));  // NaN stays
        }
        store_some(to + i, x, n);
    }
}

constexpr int64_t kTokensAhead = 2;  // fetched: slots follow no order that a processor could guess

struct Place {  // of a token on one side
    int64_t page, token;
};

inline char* row_of(const MoveSide& side, Place at, int64_t head) {
    const int64_t element = at.page * side.stride_page + at.token * side.stride_token + head * side.stride_head;
    return side.data + element * item_size(side.dtype);
}

inline float* scale_of(const MoveSide& side, Place at, int64_t head) { return side.scale.at(at.page, at.token, head); }

inline float read_scale(const MoveSide& side, Place at, int64_t head) {
    return side.scale.has_data() ? *scale_of(side, at, head) : side.scale.value;
}

inline void convert_token(const MoveParams& p, const Move& m, Place from, Place to) {
    alignas(64) float row[kMaxWidth];
    for (int64_t head = 0; head < p.num_heads; ++head) {
        load_row(m.source.dtype, row_of(m.source, from, head), m.width, row);
        if (m.source.scale.kind != ScaleKind::kNone) {
            const F times = set1(read_scale(m.source, from, head));
            for (int64_t i = 0; i < m.width; i += kLanes) store(row + i, mul(load(row + i), times));
        }
        float divisor = 1.0f;
        if (m.how == MoveHow::kQuantise) {
            divisor = finite_amax(row, m.width) / quant_max(m.target.dtype);
            if (divisor == 0.0f) divisor = 1.0f;
            *scale_of(m.target, to, head) = divisor;
        } else {
            divisor = read_scale(m.target, to, head);
        }
        with_dtype(m.target.dtype, [&](auto tag) {
            using Target = typename decltype(tag)::type;
            quantise_row(row, m.width, divisor, reinterpret_cast<Target*>(row_of(m.target, to, head)));
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
    Runs(const MoveParams& p, const Move& m, bool together) {
        const int64_t head = m.width * item_size(m.source.dtype);
        num = together ? 1 : p.num_heads;
        bytes = together ? head * p.num_heads : head;
    }
};

inline void copy_token(const MoveParams& p, const Move& m, Place from, Place to, bool stream) {
    const Runs runs(p, m, m.source.stride_head == m.width && m.target.stride_head == m.width);
    for (int64_t head = 0; head < runs.num; ++head)
        copy_bytes(row_of(m.target, to, head), row_of(m.source, from, head), runs.bytes, stream);
    if (m.source.scale.per_token()) {
        for (int64_t head = 0; head < p.num_heads; ++head)
            *scale_of(m.target, to, head) = *scale_of(m.source, from, head);
    }
}

// A scale that belongs to no token: once a move.
inline void copy_shared_scale(const MoveParams& p, const Move& m) {
    if (!m.source.scale.has_data() || m.source.scale.per_token()) return;
    const int64_t count = m.source.scale.kind == ScaleKind::kTensor ? 1 : p.num_heads;
    for (int64_t head = 0; head < count; ++head) *scale_of(m.target, {}, head) = *scale_of(m.source, {}, head);
}

inline void fetch_token(const MoveParams& p, const Move& m, int64_t slot) {  // from its page
    const Place at{slot / p.page_size, slot % p.page_size};
    const Runs runs(p, m, m.source.stride_head == m.width);
    for (int64_t head = 0; head < runs.num; ++head) {
        const char* row = row_of(m.source, at, head);
        for (int64_t byte = 0; byte < runs.bytes; byte += 64) prefetch(row + byte);
    }
}

template <class MoveToken>
void over_tokens(const MoveParams& p, const Move& m, int64_t begin, int64_t end, MoveToken move) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t slot = p.slots[i];
        if (slot < 0) continue;
        if (!p.to_cache && i + kTokensAhead < end) fetch_token(p, m, p.slots[i + kTokensAhead]);
        const Place in_pages{slot / p.page_size, slot % p.page_size};
        const Place in_rows{0, i};
        p.to_cache ? move(in_rows, in_pages) : move(in_pages, in_rows);
    }
}

void move_rows(const MoveParams& p, const Move& m, int64_t begin, int64_t end, bool stream) {
    if (m.how == MoveHow::kCopy) {
        if (begin == 0) copy_shared_scale(p, m);
        over_tokens(p, m, begin, end, [&](Place from, Place to) { copy_token(p, m, from, to, stream); });
        stream_end();
    } else {
        over_tokens(p, m, begin, end, [&](Place from, Place to) { convert_token(p, m, from, to); });
    }
}
