// Two states become one.
//
// grid: [ceil(num_rows * num_heads / rows of a block), 1]. 2^log2_lanes lanes merge one row of one head, kChunks times
// 16 bytes of both states a lane, on their way before the weights are known.
//
// Roof: the device's memory, two thirds of it reading. Plan: 128 threads, at most 64 registers, 8 blocks a
// multiprocessor: 128 bytes in flight a thread are 128 KiB a multiprocessor, where two thirds of 4.8 TB/s for 0.8 us
// ask for 20. So many, because what a row costs besides them, some 200 instructions, is shared by 2 rows of 128
// elements otherwise, and by 8 so.
#pragma once

#include "cuda/merge/plan.h"

namespace pagewire::merging {

constexpr int kChunks = 4;

struct Weights {
    float a, b;
    float largest, sum;  // of the row's lse: largest + log(sum)
};

PW_DEVICE Weights weigh(float lse_a, float lse_b) {
    const float largest = max_number(lse_a, lse_b), base = largest == -infinity() ? 0.0f : largest;
    const float a = exp_exact(lse_a - base), b = exp_exact(lse_b - base), sum = a + b;
    const float inverse = sum == 0.0f ? 0.0f : divide(1.0f, sum);
    return {a * inverse, b * inverse, largest, sum};
}

template <class T, class Out, bool kVector>
PW_KERNEL(kThreads, 8)
void merge_two_kernel(const Plan p) {
    constexpr int kCount = kElements<T, kVector>;
    const Item at = item_of_thread(p);
    const int width = at.exists ? static_cast<int>(p.states.out.width) : 0, stride = kCount << p.log2_lanes;
    const T* a = row_of<const T>(p.states.first.out, at) + at.lane * kCount;
    const T* b = row_of<const T>(p.states.second.out, at) + at.lane * kCount;
    Out* out = row_of<Out>(p.states.out, at) + at.lane * kCount;
    Weights weight;
    int left = width - at.lane * kCount;
    do {
        Stored<T, kVector> of_a[kChunks], of_b[kChunks];
        PW_UNROLL
        for (int c = 0; c < kChunks; ++c) {
            of_a[c] = load_stored<kVector>(a + c * stride, c * stride < left);
            of_b[c] = load_stored<kVector>(b + c * stride, c * stride < left);
        }
        // last, as the weights wait for them
        const float lse_a = lse_of(p.states, 0, at), lse_b = lse_of(p.states, 1, at);
        const bool is_empty_a = lse_a == -infinity(), is_empty_b = lse_b == -infinity();  // out may be anything
        weight = weigh(lse_a, lse_b);
        PW_UNROLL
        for (int c = 0; c < kChunks; ++c) {
            float x[kCount], y[kCount];
            widen<T, kVector>(is_empty_a ? Stored<T, kVector>{} : of_a[c], x);
            widen<T, kVector>(is_empty_b ? Stored<T, kVector>{} : of_b[c], y);
            PW_UNROLL
            for (int e = 0; e < kCount; ++e) x[e] = weight.a * x[e] + weight.b * y[e];
            if (c * stride < left) store_as(x, out + c * stride);
        }
        a += kChunks * stride, b += kChunks * stride, out += kChunks * stride, left -= kChunks * stride;
    } while (left > 0);
    store_lse(p, at, weight.largest, weight.sum);
}

}  // namespace pagewire::merging
