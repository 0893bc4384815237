// Merging attention states: out = sum of weight * out, weight = exp(lse - merged lse). Included in a target.

constexpr int kMergeVecs = 4;  // vectors of a row that stay in registers while the states go by

template <class T>
void merge_states(const MergeParams& p, int64_t row_begin, int64_t row_end, float* weights) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        for (int64_t head = 0; head < p.out.num_heads; ++head) {
            float top = p.sinks.data == nullptr ? -infinity() : p.sinks.data[head * p.sinks.stride_head];
            const float sink = top;
            const auto lse_of = [&](int64_t i) {
                const float lse = p.lses[i].data[row * p.lses[i].stride_row + head * p.lses[i].stride_head];
                return __builtin_isinf(lse) ? -infinity() : lse;
            };
            for (int64_t i = 0; i < p.n; ++i) {
                weights[i] = lse_of(i);
                if (top == top && !(weights[i] <= top)) top = weights[i];  // NaN stays
            }
            const bool empty = top == -infinity();
            float total = empty || sink == -infinity() ? 0.0f : __builtin_expf(sink - top);
            if (sink == infinity()) total = 1.0f;  // it takes all of the weight
            for (int64_t i = 0; i < p.n; ++i) {
                weights[i] = empty ? 0.0f : __builtin_expf(weights[i] - top);
                total += weights[i];
            }
            for (int64_t i = 0; i < p.n && !empty; ++i) weights[i] /= total;

            char* out = p.out.data + (row * p.out.stride_row + head * p.out.stride_head) * item_size(p.out.dtype);
            for (int64_t d = 0; d < p.out.width; d += kMergeVecs * kLanes) {
                float sums[kMergeVecs * kLanes] = {};
                const int64_t width = p.out.width - d < kMergeVecs * kLanes ? p.out.width - d : kMergeVecs * kLanes;
                for (int64_t i = 0; i < p.n; ++i) {
                    if (lse_of(i) == -infinity()) continue;  // its out may be anything
                    const RowsView& state = p.outs[i];
                    const T* from =
                        reinterpret_cast<const T*>(state.data) + row * state.stride_row + head * state.stride_head + d;
                    const F w = set1(weights[i]);
                    for (int64_t u = 0; u < width; u += kLanes) {
                        store(sums + u, fma(w, load_some(from + u, clip(width - u, 0, kLanes)), load(sums + u)));
                    }
                }
                store_row(p.out.dtype, sums, 1.0f, width, out + d * item_size(p.out.dtype));
            }
            if (p.lse.data != nullptr) {
                p.lse.data[row * p.lse.stride_row + head * p.lse.stride_head] =
                    empty ? -infinity() : top + __builtin_logf(total);
            }
        }
    }
}
