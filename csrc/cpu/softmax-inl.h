// From raw q.k to weights: scale, softcap, ALiBi, mask, online softmax in base 2. One row at a
// time, any number of keys.

// What a block of keys does to the logits of one row.
struct LogitRule {
    float scale;           // softmax_scale * k_scale of the head
    const float* k_scale;  // [num_keys] per token and head, or null
    float softcap;
    float slope = 0.0f;      // ALiBi; 0: off
    float distance = 0.0f;   // position of the row - first key of the block
    int begin = 0, end = 0;  // visible columns of the block
};

// What apply_rule makes of a row: times unit, its logits are base-2 logits, and their maximum is top.
struct RuledRow {
    float top, unit;
};

// logits[0 .. padded) become base-2 logits but for a unit, -inf outside [begin, end).
__attribute__((noinline)) inline RuledRow apply_rule(const LogitRule& rule, float* logits, int num_keys) {
    const F lanes = lane_index();
    const bool plain = rule.k_scale == nullptr && rule.softcap <= 0.0f && rule.slope == 0.0f;
    const bool masked = rule.begin > 0 || rule.end < int(round_up(num_keys, kLanes));
    const F scale = set1(plain ? rule.scale * kLog2E : rule.scale);
    F top = set1(-infinity());
    if (plain && !masked && rule.scale > 0.0f) {  // they stay as they are
        for (int i = 0; i < num_keys; i += kLanes) top = max(load(logits + i), top);
        const float unit = rule.scale * kLog2E;
        return {maximum(top) * unit, unit};
    }
    for (int i = 0; i < num_keys; i += kLanes) {
        F x = mul(load(logits + i), scale);
        if (!plain) {
            if (rule.k_scale != nullptr) x = mul(x, load(rule.k_scale + i));
            if (rule.softcap > 0.0f) x = mul(tanh(div(x, set1(rule.softcap))), set1(rule.softcap));
            if (rule.slope != 0.0f) {
                const F column = add(lanes, set1(float(i)));
                x = fnma(set1(rule.slope), abs(sub(set1(rule.distance), column)), x);
            }
            x = mul(x, set1(kLog2E));
        }
        if (masked) {
            const F column = add(lanes, set1(float(i)));
            x = select(less(column, set1(float(rule.end))), x, set1(-infinity()));
            x = select(less(column, set1(float(rule.begin))), set1(-infinity()), x);
        }
        store(logits + i, x);
        top = max(x, top);
    }
    return {maximum(top), 1.0f};
}

// Weights 2^(unit * x - top) of the logits x, times v_scale if that is given, go to put(key,
// weights of kLanes keys); returns their sum without v_scale. A row that has seen nothing has top =
// -inf: all weights are 0.
template <class Put>
__attribute__((noinline)) float weigh(const float* logits, int num_keys, float unit, float top, const float* v_scale,
                                      Put put) {
    const F shift = set1(top == -infinity() ? 0.0f : -top);
    const F times = set1(unit);
    F total = zero();
    for (int i = 0; i < num_keys; i += kLanes) {
        F w = exp2_negative(fma(load(logits + i), times, shift));
        total = add(total, w);
        if (v_scale != nullptr) w = mul(w, load(v_scale + i));
        put(i, w);
    }
    return sum(total);
}

// rescale[i] = 2^(old top - new top) and the new tops; 0 where nothing had been seen.
inline void raise_tops(float* top, const float* block_top, float* rescale, int num_rows) {
    for (int i = 0; i < num_rows; i += kLanes) {
        const F before = load(top + i);
        const F after = max(before, load(block_top + i));
        const F shift = select(less(set1(-infinity()), after), after, zero());
        store(rescale + i, exp2_negative(sub(before, shift)));
        store(top + i, after);
    }
}

// The end of a row: the sink joins the denominator, out = acc * v_scale / total, lse in base e.
__attribute__((noinline)) inline void finish_row(const AttentionParams& p, const Piece& piece, int64_t row,
                                                 int64_t qo_head, const float* acc, float top, float total,
                                                 float v_scale) {
    const int64_t at = row - piece.row_begin;
    const bool whole = piece.partial_out == nullptr;
    if (whole && p.sinks.data != nullptr) {
        const float sink = p.sinks.data[qo_head * p.sinks.stride_head] * kLog2E;
        const float raised = top > sink ? top : sink;
        if (raised != -infinity()) {
            const float kept = total == 0.0f ? 0.0f : __builtin_exp2f(top - raised);
            // the accumulator shares the factor
            v_scale *= kept;
            // a sink of +inf takes all of the weight
            total = total * kept + (sink == infinity() ? 1.0f : __builtin_exp2f(sink - raised));
            top = raised;
        }
    }
    const float factor = total == 0.0f ? 0.0f : v_scale / total;
    const float lse = total == 0.0f ? -infinity() : (top + __builtin_log2f(total)) * kLn2;
    if (whole) {
        char* out = p.out.data + (row * p.out.stride_row + qo_head * p.out.stride_head) * item_size(p.out.dtype);
        store_row(p.out.dtype, acc, factor, p.out.width, out);
        if (p.lse.data != nullptr) p.lse.data[row * p.lse.stride_row + qo_head * p.lse.stride_head] = lse;
    } else {
        const int64_t index = at * p.q.num_heads + qo_head;
        store_row(DType::kFloat32, acc, factor, p.out.width,
                  reinterpret_cast<char*>(piece.partial_out + index * p.out.width));
        piece.partial_lse[index] = lse;
    }
}

inline float slope_of(const AttentionParams& p, int64_t request, int64_t qo_head) {
    if (p.alibi_slopes.data == nullptr) return 0.0f;
    return p.alibi_slopes.data[request * p.alibi_slopes.stride_row + qo_head * p.alibi_slopes.stride_head];
}

inline int clip(int64_t x, int64_t low, int64_t high) { return int(x < low ? low : x > high ? high : x); }
