// Merging attention states: out = sum of weight * out, weight = exp(lse - merged lse). Included in a target.

constexpr int kMergeVecs = 4;  // vectors of a row that stay in registers while the states go by

// -inf: empty. Some libraries mark that with +inf.
inline float lse_of(const MergeParams& p, int64_t state, int64_t row, int64_t head) {
    const MatrixView& m = state == 0 ? p.first.lse : p.second.lse;
    const int64_t behind = state == 0 ? 0 : (state - 1) * p.stride_lse;
    const float lse = m.data[behind + row * m.stride_row + head * m.stride_head];
    return __builtin_isinf(lse) ? -infinity() : lse;
}

// The weight of each state of a row, adding up to 1 with the sink's. Returns the merged lse, -inf if all are empty.
inline float weigh_states(const MergeParams& p, int64_t row, int64_t head, float* weights) {
    const float sink = p.sinks.data == nullptr ? -infinity() : p.sinks.data[head * p.sinks.stride_head];
    float top = sink;
    for (int64_t i = 0; i < p.n; ++i) {
        weights[i] = lse_of(p, i, row, head);
        if (top == top && !(weights[i] <= top)) top = weights[i];  // NaN stays
    }
    if (top == -infinity()) {
        for (int64_t i = 0; i < p.n; ++i) weights[i] = 0.0f;
        return top;
    }
    float total = sink == -infinity() ? 0.0f : __builtin_expf(sink - top);
    if (sink == infinity()) total = 1.0f;  // it takes all of the weight
    for (int64_t i = 0; i < p.n; ++i) {
        weights[i] = __builtin_expf(weights[i] - top);
        total += weights[i];
    }
    for (int64_t i = 0; i < p.n; ++i) weights[i] /= total;
    return top + __builtin_logf(total);
}

// The weighted sum of columns [column, column + width) of the states that are not empty, into `sums`, zeros before.
template <class T>
void add_states(const MergeParams& p, int64_t row, int64_t head, int64_t column, int64_t width, const float* weights,
                float* sums) {
    for (int64_t i = 0; i < p.n; ++i) {
        if (lse_of(p, i, row, head) == -infinity()) continue;  // its out may be anything
        const RowsView& out = i == 0 ? p.first.out : p.second.out;
        const int64_t behind = i == 0 ? 0 : (i - 1) * p.stride_out;
        const T* from =
            reinterpret_cast<const T*>(out.data) + behind + row * out.stride_row + head * out.stride_head + column;
        const F w = set1(weights[i]);
        for (int64_t u = 0; u < width; u += kLanes) {
            store(sums + u, fma(w, load_some(from + u, clip(width - u, 0, kLanes)), load(sums + u)));
        }
    }
}

template <class T>
void merge_states(const MergeParams& p, int64_t row_begin, int64_t row_end, float* weights) {
    constexpr int64_t kColumns = kMergeVecs * kLanes;
    const RowsView& out = p.out;
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t head = 0; head < out.num_heads; ++head) {
            const float lse = weigh_states(p, row, head, weights);
            char* to = out.data + (row * out.stride_row + head * out.stride_head) * item_size(out.dtype);
            for (int64_t column = 0; column < out.width; column += kColumns) {
                float sums[kColumns] = {};
                const int64_t width = out.width - column < kColumns ? out.width - column : kColumns;
                add_states<T>(p, row, head, column, width, weights, sums);
                store_row(out.dtype, sums, 1.0f, width, to + column * item_size(out.dtype));
            }
            if (p.lse.data != nullptr) p.lse.data[row * p.lse.stride_row + head * p.lse.stride_head] = lse;
        }
    }
}
