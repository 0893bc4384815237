// What csrc/cuda/attention/schedule.h must do, in a program without kernels: it walks whole batches as the blocks of a
// launch do (requests.h), and holds the pieces against what the batch asks for.
//
// `schedule SEED COUNT` walks the picked batches and COUNT random ones; it prints the first that is done wrongly, and why.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/attention/schedule.h"

using namespace pagewire;

namespace {

struct Request {
    int row_end, seq_len;  // as the caller gives them: ends may decrease, lengths may be anything
};

struct Batch {
    bool decodes = true;
    int heads = 1, group_size = 1, row_tile_len = 16, max_q_len = 1, window_left = -1, capacity = 0, tile = 64;
    int split_size = 0;  // 0: the units are shared out evenly
    int num_blocks = 1, num_tokens = 0;
    std::vector<Request> requests = {};  // of a prefill the last one is the rows behind, without keys

    int batch_size() const { return static_cast<int>(requests.size()) - (decodes ? 0 : 1); }
};

void require(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
}

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// What arrange() in attention.cu tells the kernel and sets aside.
struct Launch {
    Schedule schedule;
    int64_t num_counters, partial_rows;
};

Launch arrange(const Batch& b) {
    const int64_t rows = int64_t(b.max_q_len) * b.group_size, of_tokens = int64_t(b.num_tokens) * b.group_size;
    const int64_t row_tiles = divide_up(rows, b.row_tile_len), items = b.batch_size() * b.heads * row_tiles;
    Schedule s{b.heads, b.group_size, b.row_tile_len, b.max_q_len, b.window_left, b.capacity, b.tile, b.split_size};
    s.splits = b.split_size > 0;
    s.max_row_tiles = static_cast<int>(row_tiles);
    if (!s.splits) {  // at most 2^30 units, of whole tiles
        s.unit_len = static_cast<int>(1 + items * divide_up(b.capacity, b.tile) / (1 << 30)) * b.tile;
        return {s, b.num_blocks, 2 * int64_t(b.num_blocks) * b.row_tile_len};
    }
    s.max_splits = static_cast<int>(std::min<int64_t>(64, divide_up(b.capacity, b.split_size)));
    s.part_rows = std::min(of_tokens, b.batch_size() * rows);
    s.part_rows_of_token = s.part_rows == of_tokens ? b.group_size : 0;
    s.part_rows_of_request = s.part_rows == of_tokens ? 0 : rows;
    if (s.max_splits <= 1) return {s, 0, 0};
    return {s, items, b.heads * s.max_splits * s.part_rows};
}

// What a request asks for: its rows of q, and the keys that any of them sees.
struct Asked {
    int row_begin = 0, q_len = 0;
    int seq_len = 0, first_key = 0;  // first_key == seq_len: no keys
    int64_t unit_len = 0;
};

Asked asked_of(const Batch& b, const Schedule& s, int request) {
    Asked a;
    for (int i = 0; i < request; ++i) a.row_begin = std::max(a.row_begin, b.requests[i].row_end);
    a.q_len = std::max(b.requests[request].row_end - a.row_begin, 0);
    if (a.q_len <= b.max_q_len) a.seq_len = std::min(std::max(b.requests[request].seq_len, 0), b.capacity);
    a.first_key = a.seq_len;
    for (int i = 0; i < a.q_len && i < b.max_q_len; ++i) {
        const int64_t position = int64_t(a.seq_len) - a.q_len + i;
        const int64_t first = b.window_left < 0 ? 0 : std::max<int64_t>(position - b.window_left, 0);
        a.first_key = static_cast<int>(std::min<int64_t>(a.first_key, first));
    }
    const int64_t least = divide_up(divide_up(a.seq_len, 64), b.tile) * b.tile;
    a.unit_len = s.splits ? std::max<int64_t>(b.split_size, least) : s.unit_len;
    return a;
}

// All pieces, in the order of their units.
std::vector<Piece> walk(const Batch& b, const Schedule& s) {
    std::vector<RequestWork> works;
    std::vector<int64_t> prefixes = {0};
    int row = 0;
    for (const Request& r : b.requests) {
        const RequestWork& work = works.emplace_back(request_work(s, row, r.row_end, r.seq_len));
        require(work.row_begin == row && work.row_end >= row, "rows do not go back");
        require(work.bad_seq_len == (r.seq_len < 0 || r.seq_len > b.capacity), "a length out of range is known");
        require(work.too_long == (int64_t(r.row_end) - row > b.max_q_len), "a request of too many rows is known");
        row = work.row_end;
        prefixes.push_back(prefixes.back() + int64_t(work.units_of_head()) * b.heads);
    }
    require(prefixes.back() <= INT_MAX, "units can be counted");
    const int total = static_cast<int>(prefixes.back()), share = ceil_div(total, b.num_blocks);
    std::vector<Piece> pieces;
    int request = 0;
    for (int64_t block = 0; block < b.num_blocks; ++block) {
        int unit = static_cast<int>(std::min<int64_t>(block * share, total));
        const int end = static_cast<int>(std::min<int64_t>((block + 1) * share, total));
        while (unit < end) {
            while (unit >= prefixes[request + 1]) ++request;
            const int prefix = static_cast<int>(prefixes[request]);
            pieces.push_back(cut_piece(s, works[request], request, prefix, unit, end, share));
            const int count = pieces.back().num_units;
            require(count >= 1 && count <= end - unit, "a piece has units, and only of its block");
            unit += count;
        }
    }
    return pieces;
}

auto item_of(const Piece& p) { return std::tuple(p.request, p.head, p.row_tile); }

// The pieces of one item, in order.
void check_item(const Batch& b, const Asked& a, const Piece* pieces, int count) {
    const bool has_keys = a.first_key < a.seq_len;
    require(has_keys || count == 1, "without keys there is one piece");
    const int64_t unseen = a.first_key % a.unit_len / b.tile * b.tile;  // of the first unit, whole tiles
    int64_t unit = a.first_key / a.unit_len;
    for (int i = 0; i < count; ++i) {
        const Piece &p = pieces[i], &first = pieces[0];
        require(std::tuple(p.row_begin, p.q_len, p.seq_len) == std::tuple(a.row_begin, a.q_len, a.seq_len),
                "a piece knows its request's rows and keys");
        require(p.has_keys() == has_keys, "with visible keys every piece has some, without there are none");
        require(has_keys || p.num_units == 1, "without keys there is one unit");
        require(b.split_size == 0 || p.num_units == 1, "a split is a piece of its own");
        require(p.num_parts == count, "as many parts as pieces");
        if (has_keys) {
            require(p.first_key == a.first_key, "the first visible key");
            require(p.key_begin == unit * a.unit_len + (i == 0 ? unseen : 0), "keys follow on the piece before");
            unit += p.num_units;
            require(p.key_end == std::min<int64_t>(unit * a.unit_len, a.seq_len), "units are unit_len keys");
        }
        if (count == 1) continue;
        require(std::tuple(p.counter, p.first_row, p.next_row, p.row_step) ==
                    std::tuple(first.counter, first.first_row, first.next_row, first.row_step),
                "the parts agree on where they meet");
        require(p.own_row == p.row_of(i), "part i lies where the others look for it");
    }
    require(!has_keys || unit == divide_up(a.seq_len, a.unit_len), "all keys are done, and no unit is without");
    require(b.split_size == 0 || count <= 64, "at most 64 splits");
}

// With splits: the `count` pieces of a request are those of the request alone, in any launch.
void check_alone(Batch b, const Schedule& s, const Asked& a, int seq_len, const Piece* pieces, size_t count) {
    const auto what = [](const Piece& p) {
        return std::tuple(p.head, p.row_tile, p.key_begin, p.key_end, p.num_parts);
    };
    const auto same = [&](const Piece& x, const Piece& y) { return what(x) == what(y); };
    b.requests = {{a.q_len, seq_len}};
    for (const int num_blocks : {1, 7}) {
        b.num_blocks = num_blocks;
        const std::vector<Piece> alone = walk(b, s);
        require(std::equal(alone.begin(), alone.end(), pieces, pieces + count, same), "splits depend on one request");
    }
}

void check(const Batch& b) {
    const Launch launch = arrange(b);
    const Schedule& s = launch.schedule;
    const std::vector<Piece> pieces = walk(b, s);
    const size_t rows_of_head = size_t(b.num_tokens) * b.group_size;
    std::vector<char> done(b.heads * rows_of_head);
    std::set<int> counters;
    std::vector<std::pair<int64_t, int64_t>> places;  // rows of partial, of all parts of the launch
    Asked a;                                          // of the piece's request
    for (size_t i = 0, end; i < pieces.size(); i = end) {
        const Piece& p = pieces[i];
        require(i == 0 || item_of(pieces[i - 1]) < item_of(p), "row tiles of a head follow each other");
        for (end = i; end < pieces.size() && item_of(pieces[end]) == item_of(p); ++end) continue;
        if (i == 0 || p.request != pieces[i - 1].request) {
            a = asked_of(b, s, p.request);
            const auto of_another = [&](const Piece& other) { return other.request != p.request; };
            const size_t count = std::find_if(pieces.begin() + i, pieces.end(), of_another) - pieces.begin() - i;
            if (s.splits) check_alone(b, s, a, b.requests[p.request].seq_len, &p, count);
        }
        check_item(b, a, &p, static_cast<int>(end - i));
        const int64_t first_row = int64_t(p.row_tile) * b.row_tile_len;
        const int64_t num_rows = std::min<int64_t>(int64_t(a.q_len) * b.group_size - first_row, b.row_tile_len);
        require(p.head >= 0 && p.head < b.heads && num_rows > 0, "an item has rows");
        for (int64_t row = 0; row < num_rows; ++row) {
            char& is_done = done[p.head * rows_of_head + int64_t(a.row_begin) * b.group_size + first_row + row];
            require(!is_done, "a row is in one item only");
            is_done = 1;
        }
        if (p.num_parts == 1) continue;
        require(p.counter >= 0 && p.counter < launch.num_counters, "there is such a counter");
        require(counters.insert(p.counter).second, "a counter is one item's");
        for (size_t j = i; j < end; ++j) places.emplace_back(pieces[j].own_row, pieces[j].own_row + num_rows);
    }
    require(std::count(done.begin(), done.end(), 0) == 0, "every row is done");
    std::sort(places.begin(), places.end());
    for (size_t i = 0; i < places.size(); ++i) {
        require(places[i].first >= (i == 0 ? 0 : places[i - 1].second), "parts lie apart");
        require(places[i].second <= launch.partial_rows, "parts lie in the work space");
    }
}

// As many rows as an int counts, all behind the last request's.
constexpr Schedule kManyRows{.num_kv_heads = 1, .group_size = 96, .row_tile_len = 16, .max_q_len = 1, .unit_len = 64};
static_assert(request_work(kManyRows, 0, INT_MAX / 96, 0).num_row_tiles == (INT_MAX / 96 * 96 + 15ll) / 16);

struct Dice {
    std::mt19937 engine;
    int of(std::initializer_list<int> choices) { return choices.begin()[engine() % choices.size()]; }
    int between(int low, int high) { return low + static_cast<int>(engine() % (int64_t(high) - low + 1)); }
};

Batch random_batch(Dice& dice) {
    Batch b;
    b.decodes = dice.of({0, 1});
    b.tile = dice.of({32, 64, 128});
    b.group_size = dice.of({1, 2, 5, 8, 16, dice.between(1, 96)});
    b.max_q_len = b.decodes ? 1 : dice.of({1, 3, dice.between(1, 16)});
    b.row_tile_len = dice.of({16, 32, 64});
    b.heads = dice.of({1, 2, dice.between(1, 8)});
    b.num_blocks = dice.of({1, 2, dice.between(1, 20), dice.between(1, 1000)});
    const int page_size = dice.of({1, 16, 24, 64});
    b.capacity = dice.of({0, 1, page_size, page_size * dice.between(1, 40), 8191, 1 << 20, INT_MAX});
    b.window_left = dice.of({-1, -1, 0, 1, b.tile, dice.between(0, b.capacity), INT_MAX});
    b.split_size = dice.of({0, 0, 0, 1, 100, b.tile, dice.between(1, 2048), INT_MAX});
    const int size = dice.of({0, 1, 2, dice.between(0, 12)}), excess = dice.of({0, 2});
    for (int i = 0; i < size; ++i) {
        const int seq_len = dice.of({0, 1, b.capacity, dice.between(0, b.capacity), dice.between(0, b.capacity)});
        const int wild = dice.of({INT_MIN, -1, seq_len, INT_MAX, b.capacity < INT_MAX ? b.capacity + 1 : 0});
        const int q_len = dice.of({0, 1, b.max_q_len, dice.between(-excess, b.max_q_len + excess)});
        b.num_tokens += b.decodes ? 1 : std::max(q_len, 0);
        const int row_end = b.decodes || q_len >= 0 ? b.num_tokens : std::max(b.num_tokens + q_len, 0);
        b.requests.push_back({row_end, excess > 0 ? wild : seq_len});
    }
    if (!b.decodes) b.requests.push_back({b.num_tokens += dice.of({0, 0, 1, 40}), 0});
    return b;
}

// Batches that a change is likely to break, and the limits.
std::vector<Batch> picked_batches() {
    std::vector<Batch> all;
    for (const int split_size : {0, 1, 64, 1000, INT_MAX}) {
        for (const int capacity : {1, 4096, 4097, 64 * 1000 + 1, INT_MAX - 1, INT_MAX}) {
            for (const int num_blocks : {1, 3, 264, 1000}) {
                Batch b{.capacity = capacity, .split_size = split_size, .num_blocks = num_blocks, .num_tokens = 1};
                b.requests = {{1, capacity}};
                all.push_back(b);
                b.heads = 8, b.group_size = 96, b.row_tile_len = 64, b.window_left = capacity / 2;
                all.push_back(b);  // the second row tile is half full
                b.num_tokens = 5;
                b.requests = {{1, capacity}, {2, 0}, {3, 1}, {4, capacity}, {5, 64}};
                all.push_back(b);  // long ones among short ones
                b.decodes = false, b.max_q_len = 2, b.num_tokens = 9;
                b.requests = {{2, capacity}, {1, capacity}, {3, capacity}, {6, capacity}, {6, 5}, {9, 0}};
                all.push_back(b);  // decreasing, too long, without rows, and rows behind
            }
        }
    }
    for (const int capacity : {6000, INT_MAX}) {  // of the longer one 2^30 units
        Batch b{.heads = 8, .group_size = 5, .capacity = capacity, .num_blocks = 396, .num_tokens = 1000};
        for (int i = 0; i < 1000; ++i) b.requests.push_back({i + 1, capacity / 6 * (i % 7)});
        all.push_back(b);
        for (Request& r : b.requests) r.seq_len = capacity;
        all.push_back(b);
    }
    return all;
}

void print(const Batch& b) {
    std::printf("%s: heads %d, group_size %d, row_tile_len %d, max_q_len %d, window_left %d, capacity %d, ",
                b.decodes ? "decode" : "prefill", b.heads, b.group_size, b.row_tile_len, b.max_q_len, b.window_left,
                b.capacity);
    std::printf("tile %d, split_size %d, num_blocks %d, (row_end, seq_len)", b.tile, b.split_size, b.num_blocks);
    for (const Request& r : b.requests) std::printf(" (%d, %d)", r.row_end, r.seq_len);
    std::printf("\n");
}

}  // namespace

int main(int, char** argv) {
    std::vector<Batch> batches = picked_batches();
    Dice dice{std::mt19937(static_cast<unsigned>(std::atoi(argv[1])))};
    for (int i = 0; i < std::atoi(argv[2]); ++i) batches.push_back(random_batch(dice));
    for (const Batch& b : batches) {
        try {
            check(b);
        } catch (const std::exception& wrong) {
            print(b);
            std::printf("does not hold: %s\n", wrong.what());
            return 1;
        }
    }
    std::printf("%zu batches hold\n", batches.size());
}
