// merge_state, merge_states.
//
// grid: [ceil(num_rows * num_heads / 4), 1]; a warp merges one row of one head, in state order.
//
// Plan: 128 threads, at least 8 blocks a multiprocessor (64 registers), no shared memory.
#include "cuda/merge.h"

#include <stdexcept>

#include "cuda/convert.h"
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

PW_DEVICE float lse_of(const MergeStates& s, int64_t state, int64_t row, int64_t head) {
    const float lse =
        load_global(s.lse + state * s.lse_stride_state + row * s.lse_stride_row + head * s.lse_stride_head);
    return lse == infinity() ? -infinity() : lse;
}

template <class T, class Out>
PW_KERNEL(kThreads, 8)
void merge_kernel(const MergeRequest q, bool vector) {
    const int64_t item = int64_t(block_x()) * (kThreads / 32) + thread_index() / 32;
    if (item >= q.num_rows * q.num_heads) return;
    const int lane = thread_index() % 32;
    const int64_t row = item / q.num_heads, head = item % q.num_heads;
    const auto lse = [&](int i) { return i == 0 ? lse_of(q.first, 0, row, head) : lse_of(q.rest, i - 1, row, head); };
    float largest = -infinity();
    for (int i = 0; i < q.num_states; ++i) largest = lse(i) > largest ? lse(i) : largest;
    const float base = largest == -infinity() ? 0.0f : largest;
    float sum = 0.0f;
    for (int i = 0; i < q.num_states; ++i) sum += exp_exact(lse(i) - base);
    const float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    for (int64_t at = lane * kElements; at < q.width; at += 32 * kElements) {
        float total[kElements] = {};
        for (int i = 0; i < q.num_states; ++i) {
            const float weight = exp_exact(lse(i) - base) * inverse;
            if (lse(i) == -infinity()) continue;  // an empty state's out may be anything
            const MergeStates& s = i == 0 ? q.first : q.rest;
            const int64_t offset = (i == 0 ? 0 : i - 1) * s.stride_state + row * s.stride_row + head * s.stride_head;
            float x[kElements];
            load4<T>(x, s.out + offset * static_cast<int64_t>(sizeof(T)), at, q.width, vector);
            PW_UNROLL
            for (int e = 0; e < kElements; ++e) total[e] += weight * x[e];
        }
        const int64_t offset = row * q.stride_row + head * q.stride_head;
        store4<Out>(total, q.out + offset * static_cast<int64_t>(sizeof(Out)), at, q.width, vector);
    }
    sync_warp();  // lse may be one of the inputs: all lanes have read it
    if (lane == 0) {
        store_global(q.lse + row * q.lse_stride_row + head * q.lse_stride_head,
                     sum == 0.0f ? -infinity() : largest + log_exact(sum));
    }
}

template <class T, class Out>
void run(const MergeRequest& q) {
    const auto aligned = [](const void* p, int64_t strides, size_t size) {
        return (reinterpret_cast<uintptr_t>(p) % (kElements * size)) == 0 && strides % kElements == 0;
    };
    const auto mixed = [](const MergeStates& s) { return s.stride_state | s.stride_row | s.stride_head; };
    const bool vector = q.width % kElements == 0 && aligned(q.first.out, mixed(q.first), sizeof(T)) &&
                        aligned(q.rest.out, mixed(q.rest), sizeof(T)) &&
                        aligned(q.out, q.stride_row | q.stride_head, sizeof(Out));
    const int64_t items = q.num_rows * q.num_heads;
    launch(merge_kernel<T, Out>, LaunchConfig{"merge_kernel", (items + 3) / 4, 1, kThreads, 0, q.stream}, q, vector);
}

template <class T>
void run_to(const MergeRequest& q) {
    return q.out_dtype == q.dtype ? run<T, T>(q) : run<T, float>(q);
}

}  // namespace

void merge(const MergeRequest& q) {
    if (q.num_rows * q.num_heads == 0) return;
    UseDevice guard(q.device);
    switch (q.dtype) {
        case DType::kFloat16:
            return run_to<Float16>(q);
        case DType::kBFloat16:
            return run_to<BFloat16>(q);
        case DType::kFloat32:
            return run<float, float>(q);
        default:
            throw std::invalid_argument("pagewire: merge_states takes fp16, bf16 and fp32");
    }
}

}  // namespace pagewire
