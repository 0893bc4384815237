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

constexpr int64_t kBytesAhead = 12 * 1024;  // fetched: pages follow no order that a processor could guess

struct Place {  // of a token on one side
    int64_t page, token;
};

// A side's rows, counted in bytes.
struct Rows {
    char* data;
    int64_t page, token, head;

    explicit Rows(const MoveSide& side) : data(side.data) {
        const int64_t item = item_size(side.dtype);
        page = side.stride_page * item;
        token = side.stride_token * item;
        head = side.stride_head * item;
    }
    char* at(Place place) const { return data + place.page * page + place.token * token; }
};

inline float* scale_of(const MoveSide& side, Place at, int64_t head) { return side.scale.at(at.page, at.token, head); }

inline float read_scale(const MoveSide& side, Place at, int64_t head) {
    return side.scale.has_data() ? *scale_of(side, at, head) : side.scale.value;
}

inline void convert_token(const MoveParams& p, const Move& m, const Rows& source, const Rows& target, Place from,
                          Place to) {
    alignas(64) float row[kMaxWidth];
    for (int64_t head = 0; head < p.num_heads; ++head) {
        load_row(m.source.dtype, source.at(from) + head * source.head, m.width, row);
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
            quantise_row(row, m.width, divisor, reinterpret_cast<Target*>(target.at(to) + head * target.head));
        });
    }
}

inline void copy_bytes(char* to, const char* from, int64_t bytes, bool stream) {
    if (bytes % 64 != 0) {
        __builtin_memcpy(to, from, bytes);
    } else if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        for (int64_t i = 0; i < bytes; i += 64) stream64(to + i, from + i);
    } else {
        for (int64_t i = 0; i < bytes; i += 64) __builtin_memcpy(to + i, from + i, 64);
    }
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

inline void copy_token_scales(const MoveParams& p, const Move& m, Place from, Place to) {
    for (int64_t head = 0; head < p.num_heads; ++head) *scale_of(m.target, to, head) = *scale_of(m.source, from, head);
}

// A scale that belongs to no token: once a move.
inline void copy_shared_scale(const MoveParams& p, const Move& m) {
    if (!m.source.scale.has_data() || m.source.scale.per_token()) return;
    const int64_t count = m.source.scale.kind == ScaleKind::kTensor ? 1 : p.num_heads;
    for (int64_t head = 0; head < count; ++head) *scale_of(m.target, {}, head) = *scale_of(m.source, {}, head);
}

// Inlined by order, as prefetch is: GCC drops a call of a function that does nothing but fetch.
[[gnu::always_inline]] inline void fetch(const Rows& rows, Place at, Runs runs) {
    for (int64_t head = 0; head < runs.num; ++head) {
        for (int64_t byte = 0; byte < runs.bytes; byte += 64) prefetch(rows.at(at) + head * rows.head + byte);
    }
}

template <class MoveToken>
void over_tokens(const MoveParams& p, const Move& m, int64_t begin, int64_t end, MoveToken move) {
    const Rows source(m.source);
    const Runs runs(p, m, m.source.stride_head == m.width);
    const int64_t ahead = p.to_cache ? 0 : 1 + kBytesAhead / (runs.num * runs.bytes);
    for (int64_t i = begin - ahead; i < end; ++i) {
        if (ahead && i + ahead < end) {
            const int64_t slot = p.slots[i + ahead];
            fetch(source, {slot / p.page_size, slot % p.page_size}, runs);
        }
        if (i < begin || p.slots[i] < 0) continue;
        const Place in_pages{p.slots[i] / p.page_size, p.slots[i] % p.page_size};
        const Place in_rows{0, i};
        move(p.to_cache ? in_rows : in_pages, p.to_cache ? in_pages : in_rows);
    }
}

void move_rows(const MoveParams& p, const Move& m, int64_t begin, int64_t end, bool stream) {
    const Rows source(m.source);
    const Rows target(m.target);
    if (m.how != MoveHow::kCopy) {
        over_tokens(p, m, begin, end, [&](Place from, Place to) { convert_token(p, m, source, target, from, to); });
        return;
    }
    const Runs runs(p, m, m.source.stride_head == m.width && m.target.stride_head == m.width);
    const bool scales = m.source.scale.per_token();
    if (begin == 0) copy_shared_scale(p, m);
    over_tokens(p, m, begin, end, [&](Place from, Place to) {
        const char* row = source.at(from);
        char* to_row = target.at(to);
        for (int64_t run = 0; run < runs.num; ++run)
            copy_bytes(to_row + run * target.head, row + run * source.head, runs.bytes, stream);
        if (scales) copy_token_scales(p, m, from, to);
    });
    stream_end();
}
