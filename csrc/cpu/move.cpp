// append, pack, unpack, merge: the work shared out over tokens.
#include <algorithm>
#include <vector>

#include "cpu/ops.h"
#include "cpu/pool.h"
#include "pagewire/check.h"

namespace pagewire::cpu {
namespace {

constexpr int64_t kBytesPerTask = 256 * 1024;
// A call that writes as much goes past the caches, which keep no more of it for whoever reads it next: attention what
// was appended, a checksum and a socket what was packed; what was unpacked waits for the rest of its prompt.
constexpr int64_t kStreamBytes = 16 << 20;
constexpr int64_t kStreamUnpackedBytes = 1 << 20;

}  // namespace

void move(const MoveParams& p, const Kernels& kernels, int num_threads) {
    check_slots(p);
    int64_t token_bytes = 1;
    int64_t all_bytes = 0;
    for (int64_t i = 0; i < p.num_moves; ++i) {
        const Move& m = p.moves[i];
        const int64_t bytes = p.num_heads * m.width * item_size(m.source.dtype);
        token_bytes = std::max(token_bytes, bytes);
        all_bytes += bytes * p.slots.size;
    }
    const bool stream = all_bytes >= (p.to_cache && !p.is_append ? kStreamUnpackedBytes : kStreamBytes);
    const int64_t tokens_each = std::max<int64_t>(16, kBytesPerTask / token_bytes);
    const int64_t chunks = (p.slots.size + tokens_each - 1) / tokens_each;
    parallel_for(num_threads, chunks * p.num_moves, [&](int64_t i, int) {
        const int64_t begin = i % chunks * tokens_each;
        const int64_t end = std::min(begin + tokens_each, p.slots.size);
        kernels.move_rows(p, p.moves[i / chunks], begin, end, stream);
    });
}

void merge_states(const MergeParams& p, const Kernels& kernels, int num_threads) {
    const int64_t row_bytes = std::max<int64_t>(1, p.out.num_heads * p.out.width * 4 * std::max<int64_t>(p.n, 1));
    const int64_t rows_each = std::max<int64_t>(1, kBytesPerTask / row_bytes);
    const int64_t chunks = (p.out.num_rows + rows_each - 1) / rows_each;
    std::vector<float> weights(std::max<int64_t>(p.n, 1) * num_threads);
    parallel_for(num_threads, chunks, [&](int64_t i, int thread) {
        kernels.merge_states(p, i * rows_each, std::min((i + 1) * rows_each, p.out.num_rows),
                             weights.data() + thread * p.n);
    });
}

float read(const float* data, int64_t count, const Kernels& kernels, int num_threads) {
    const int64_t each = kBytesPerTask;
    std::vector<float> tops(num_threads, data[0]);
    parallel_for(num_threads, (count + each - 1) / each, [&](int64_t i, int thread) {
        tops[thread] = std::max(tops[thread], kernels.read(data + i * each, std::min(each, count - i * each)));
    });
    return *std::max_element(tops.begin(), tops.end());
}

}  // namespace pagewire::cpu
