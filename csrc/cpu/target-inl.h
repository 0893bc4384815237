// The table of one ISA. Included last inside the anonymous namespace of a target.

void attend_few_rows(const AttentionParams& p, const Piece& piece, char* scratch) {
    with_dtype(p.k.dtype,
               [&](auto tag) { attend_few_rows<typename decltype(tag)::type>(p, piece, scratch); });
}

void attend_tile(const AttentionParams& p, const Piece& piece, char* scratch) {
    with_dtype(p.k.dtype,
               [&](auto tag) { attend_tile<typename decltype(tag)::type>(p, piece, scratch); });
}

void merge_states(const MergeParams& p, int64_t row_begin, int64_t row_end, float* weights) {
    if (p.n == 0) return merge_states<float>(p, row_begin, row_end, weights);
    with_dtype(p.outs[0].dtype, [&](auto tag) {
        merge_states<typename decltype(tag)::type>(p, row_begin, row_end, weights);
    });
}
