// Attention of a few rows per kv head: decode, speculative verification, short chunks. Bound by
// memory: every KV byte is read once for all rows of its group, K and V straight from the pages.
// FmaRows and AmxRows do the arithmetic.

// Keys of a block, counted from its first.
struct BlockRange {
    int begin, end;
};

// Where the rows of the next step are, fetched line by line while this one computes.
struct Ahead {
    const char* const* rows;
    int64_t byte;
};

// One kv head against one block of keys: its K and V begin k_byte and v_byte into those of head 0.
template <int kKeys>
struct Step {
    const KeyBlock<kKeys>& block;
    int64_t h;  // kv head of the piece
    int64_t k_byte, v_byte;
    Ahead next_k, next_v;
};

// A piece of few rows: row r of head h is token r / group, query head r % group of its group.
struct FewRows {
    const AttentionParams& p;
    const Piece& piece;
    const int64_t group = p.q.num_heads / p.k.num_kv_heads;
    const int64_t R = (piece.row_end - piece.row_begin) * group;
    const int64_t H = piece.head_end - piece.head_begin;
    const int64_t D = p.k.width, Dv = p.v.width;
    const bool token_k = p.k_scale.kind == ScaleKind::kTokenHead;
    const bool token_v = p.v_scale.kind == ScaleKind::kTokenHead;
    const KeyRange all = keys_all_see(p, piece.seq_len, piece.position, piece.row_end - piece.row_begin);
    FewRowsScratch s{};

    FewRows(const AttentionParams& p, const Piece& piece, char* scratch) : p(p), piece(piece) {
        Carver carver{scratch};
        s.carve(carver, H, R, D, Dv);
        for (int64_t i = 0; i < H * round_up(R, kAlign); ++i) {
            s.top[i] = -infinity();
            s.total[i] = 0.0f;
        }
        __builtin_memset(s.acc, 0, H * R * s.ld_acc * sizeof(float));
    }

    int64_t row(int64_t r) const { return piece.row_begin + r / group; }
    int64_t head(int64_t h) const { return piece.head_begin + h; }
    int64_t qo_head(int64_t h, int64_t r) const { return head(h) * group + r % group; }
    int64_t position(int64_t r) const { return piece.position + r / group; }
    KeyRange seen(int64_t r) const { return visible_keys(p, piece.seq_len, position(r)); }
    template <int kKeys>
    BlockRange seen(int64_t r, const KeyBlock<kKeys>& block) const {
        const KeyRange keys = seen(r);
        return {clip(keys.begin - block.begin, 0, block.num_keys), clip(keys.end - block.begin, 0, block.num_keys)};
    }
    // Where some row does not see some key: its weight there is 0, and 0 * inf is NaN.
    template <class T, int kKeys>
    bool row_by_row(const Step<kKeys>& step) const {
        const KeyBlock<kKeys>& block = step.block;
        return (block.begin < all.begin || block.begin + block.num_keys > all.end) &&
               any_non_finite<T>(block.v, block.num_keys, step.v_byte, Dv, token_v ? s.v_scale : nullptr);
    }
    float slope(int64_t h, int64_t r) const { return slope_of(p, piece.request, qo_head(h, r)); }
    float logit_scale(int64_t h) const {
        return p.softmax_scale * (token_k ? 1.0f : p.k_scale.of(piece.request, head(h)));
    }
    const char* query(int64_t h, int64_t r) const {
        return p.q.data + (row(r) * p.q.stride_row + qo_head(h, r) * p.q.stride_head) * item_size(p.q.dtype);
    }

    template <int kKeys>
    void take_token_scales(const KeyBlock<kKeys>& block, int64_t h) const {
        for (int i = 0; i < kKeys; ++i) {
            const bool real = i < block.num_keys;
            if (token_k) s.k_scale[i] = real ? *p.k_scale.at(block.page[i], block.offset[i], head(h)) : 0.0f;
            if (token_v) s.v_scale[i] = real ? *p.v_scale.at(block.page[i], block.offset[i], head(h)) : 0.0f;
        }
    }

    // The sums of the row are in s.row.
    void finish(int64_t h, int64_t r, float top, float total) const {
        const float v_scale = token_v ? 1.0f : p.v_scale.of(piece.request, head(h));
        finish_row(p, piece, row(r), qo_head(h, r), s.row, top, total, v_scale);
    }
};

template <class Rows>
void attend_few(const AttentionParams& p, const Piece& piece, char* scratch) {
    const FewRows f(p, piece, scratch);
    const int64_t item = item_size(p.k.dtype);
    const Rows rows{f};
    for (int64_t h = 0; h < f.H; ++h) {
        for (int64_t r = 0; r < f.R; ++r) rows.take_query(h, r, f.query(h, r));
    }

    KeyBlock<Rows::kKeys> blocks[2];
    const auto locate = [&](KeyBlock<Rows::kKeys>& block, int64_t at) {  // up to the next multiple of kKeys, of head 0
        block.locate(p, piece, at, int(Rows::kKeys - at % Rows::kKeys), 0);
    };
    locate(blocks[0], piece.key_begin);
    for (int turn = 0; blocks[turn].num_keys > 0; turn ^= 1) {
        const auto& block = blocks[turn];
        auto& following = blocks[turn ^ 1];
        locate(following, block.begin + block.num_keys);
        for (int64_t h = 0; h < f.H; ++h) {
            if (f.token_k || f.token_v) f.take_token_scales(block, h);
            const bool last = h + 1 == f.H;  // the next step is the next head or the next keys
            const auto& next = last && following.num_keys > 0 ? following : block;
            const int64_t next_head = last ? f.head(0) : f.head(h + 1);
            rows.add_block({block,
                            h,
                            f.head(h) * p.k.stride_head * item,
                            f.head(h) * p.v.stride_head * item,
                            {next.k, next_head * p.k.stride_head * item},
                            {next.v, next_head * p.v.stride_head * item}});
        }
    }

    for (int64_t h = 0; h < f.H; ++h) {
        for (int64_t r = 0; r < f.R; ++r) rows.finish(h, r);
    }
}
