// Where a block of keys lies: the walk through the page table. Included inside the anonymous namespace of a target.

// Addresses of one kv head's rows of a block of keys; entries past num_keys repeat the last, so that tiles need no tail.
template <int kKeys>
struct KeyBlock {
    int64_t begin;
    int num_keys;
    const char *k[kKeys], *v[kKeys];
    int64_t page[kKeys], offset[kKeys];

    // Keys from `at` on, `most` of them or up to the piece's last.
    void locate(const AttentionParams& p, const Piece& piece, int64_t at, int most, int64_t head) {
        begin = at;
        num_keys = clip(piece.key_end - at, 0, most);
        const int64_t item = item_size(p.k.dtype);
        for (int i = 0; i < num_keys;) {
            const int64_t entry = (at + i) / p.k.page_size;
            const int64_t id = p.page_table.at(piece.request, entry);
            int64_t within = at + i - entry * p.k.page_size;
            for (; i < num_keys && within < p.k.page_size; ++i, ++within) {
                page[i] = id;
                offset[i] = within;
                k[i] = p.k.data + (id * p.k.stride_page + within * p.k.stride_token + head * p.k.stride_head) * item;
                v[i] = p.v.data + (id * p.v.stride_page + within * p.v.stride_token + head * p.v.stride_head) * item;
            }
        }
        for (int i = num_keys; i < kKeys && i > 0; ++i) {
            k[i] = k[i - 1];
            v[i] = v[i - 1];
        }
    }
};
