// The table of one ISA. Included last inside the anonymous namespace of a target.

void attend_few_rows(const AttentionParams& p, const Piece& piece, char* scratch) {
    with_dtype(p.k.dtype, [&](auto tag) { attend_few<FmaRows<typename decltype(tag)::type>>(p, piece, scratch); });
}

void attend_tile(const AttentionParams& p, const Piece& piece, char* scratch) {
    with_dtype(p.k.dtype, [&](auto tag) { attend_tile<FmaTile<typename decltype(tag)::type>>(p, piece, scratch); });
}

void merge_states(const MergeParams& p, int64_t row_begin, int64_t row_end, float* weights) {
    with_dtype(p.first.out.dtype,
               [&](auto tag) { merge_states<typename decltype(tag)::type>(p, row_begin, row_end, weights); });
}

float read(const float* data, int64_t count) {
    F x[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int u = 0; u < 4; ++u) {
            prefetch(data + i + u * kLanes + 1024);
            x[u] = max(x[u], load(data + i + u * kLanes));
        }
    }
    return maximum(max(max(x[0], x[1]), max(x[2], x[3])));
}
