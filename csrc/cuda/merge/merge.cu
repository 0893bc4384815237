// merge_state, merge_states.
//
// grid: [ceil(num_rows * num_heads / 4), 1]; a warp merges one row of one head, in state order.
//
// Plan: 128 threads, at least 8 blocks a multiprocessor (64 registers), no shared memory.
#include "cuda/merge/merge.h"

#include <stdexcept>

#include "cuda/convert.h"
#include "cuda/device/memory.h"
#include "cuda/launch.h"

namespace pagewire {

namespace {

constexpr int kThreads = 128;
constexpr int kElements = 4;  // a lane's: 8 or 16 bytes

template <class T>
PW_DEVICE void load4(float (&x)[kElements], const char* row, int64_t at, int64_t width, bool vector) {
    const T* p = reinterpret_cast<const T*>(row) + at;
    if (vector) {
        struct alignas(4 * sizeof(T)) Four {
            T e[kElements];
        };
        const Four four = load_global(reinterpret_cast<const Four*>(p));
        PW_UNROLL
        for (int i = 0; i < kElements; ++i) x[i] = to_float(four.e[i]);
    } else {
        PW_UNROLL
        for (int i = 0; i < kElements; ++i) x[i] = at + i < width ? to_float(load_global(p + i)) : 0.0f;
    }
}

template <class T>
PW_DEVICE void store4(const float (&x)[kElements], char* row, int64_t at, int64_t width, bool vector) {
    T* p = reinterpret_cast<T*>(row) + at;
    struct alignas(4 * sizeof(T)) Four {
        T e[kElements];
    } four;
    PW_UNROLL
    for (int i = 0; i < kElements; ++i) from_float(x[i], four.e[i]);
    if (vector) {
        store_global(reinterpret_cast<Four*>(p), four);
    } else {
        PW_UNROLL
        for (int i = 0; i < kElements; ++i) {
            if (at + i < width) store_global(p + i, four.e[i]);
        }
    }
}

PW_DEVICE float lse_of(const MergeParams& p, int state, int64_t row, int64_t head) {
    const MatrixView& m = state == 0 ? p.first.lse : p.second.lse;
    const int64_t behind = state == 0 ? 0 : (state - 1) * p.stride_lse;
    const float lse = load_global(m.data + behind + row * m.stride_row + head * m.stride_head);
    return lse == infinity() ? -infinity() : lse;
}

template <class T, class Out>
PW_KERNEL(kThreads, 8)
void merge_kernel(const MergeParams p, bool vector) {
    const int64_t item = int64_t(block_x()) * (kThreads / 32) + thread_index() / 32;
    if (item >= p.out.num_rows * p.out.num_heads) return;
    const int lane = thread_index() % 32;
    const int64_t row = item / p.out.num_heads, head = item % p.out.num_heads;
    const int n = static_cast<int>(p.n);
    const auto lse = [&](int i) { return lse_of(p, i, row, head); };
    float largest = -infinity();
    for (int i = 0; i < n; ++i) largest = lse(i) > largest ? lse(i) : largest;
    const float base = largest == -infinity() ? 0.0f : largest;
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += exp_exact(lse(i) - base);
    const float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    for (int64_t at = lane * kElements; at < p.out.width; at += 32 * kElements) {
        float total[kElements] = {};
        for (int i = 0; i < n; ++i) {
            const float weight = exp_exact(lse(i) - base) * inverse;
            if (lse(i) == -infinity()) continue;  // an empty state's out may be anything
            const RowsView& s = i == 0 ? p.first.out : p.second.out;
            const int64_t behind = i == 0 ? 0 : (i - 1) * p.stride_out;
            const int64_t offset = behind + row * s.stride_row + head * s.stride_head;
            float x[kElements];
            load4<T>(x, s.data + offset * static_cast<int64_t>(sizeof(T)), at, p.out.width, vector);
            PW_UNROLL
            for (int e = 0; e < kElements; ++e) total[e] += weight * x[e];
        }
        const int64_t offset = row * p.out.stride_row + head * p.out.stride_head;
        store4<Out>(total, p.out.data + offset * static_cast<int64_t>(sizeof(Out)), at, p.out.width, vector);
    }
    sync_warp();  // lse may be one of the inputs: all lanes have read it
    if (lane == 0) {
        store_global(p.lse.data + row * p.lse.stride_row + head * p.lse.stride_head,
                     sum == 0.0f ? -infinity() : largest + log_exact(sum));
    }
}

template <class T, class Out>
void run(const MergeParams& p, const Call& call) {
    const auto aligned = [](const RowsView& rows, int64_t behind, size_t size) {
        return (reinterpret_cast<uintptr_t>(rows.data) % (kElements * size)) == 0 &&
               (rows.stride_row | rows.stride_head | behind) % kElements == 0;
    };
    const bool vector = p.out.width % kElements == 0 && aligned(p.first.out, 0, sizeof(T)) &&
                        aligned(p.second.out, p.stride_out, sizeof(T)) && aligned(p.out, 0, sizeof(Out));
    const int64_t items = p.out.num_rows * p.out.num_heads;
    launch(merge_kernel<T, Out>,
           LaunchConfig{.name = "merge_kernel",
                        .grid_x = (items + 3) / 4,
                        .grid_y = 1,
                        .num_threads = kThreads,
                        .shared_bytes = 0,
                        .stream = call.stream},
           p, vector);
}

template <class T>
void run_to(const MergeParams& p, const Call& call) {
    return p.out.dtype == p.first.out.dtype ? run<T, T>(p, call) : run<T, float>(p, call);
}

}  // namespace

void merge(const MergeParams& p, const Call& call) {
    if (p.out.num_rows * p.out.num_heads == 0) return;
    UseDevice guard(call.device);
    switch (p.first.out.dtype) {
        case DType::kFloat16:
            return run_to<Float16>(p, call);
        case DType::kBFloat16:
            return run_to<BFloat16>(p, call);
        case DType::kFloat32:
            return run<float, float>(p, call);
        default:
            throw std::invalid_argument("pagewire: merge_states takes fp16, bf16 and fp32");
    }
}

}  // namespace pagewire
