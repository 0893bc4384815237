// The device primitives in PTX. See device.h.
#pragma once

#include <cstdint>

#define PW_DEVICE __device__ __forceinline__
#define PW_HOST_DEVICE __host__ __device__ __forceinline__
#define PW_KERNEL(threads, min_blocks_per_sm) __global__ __launch_bounds__(threads, min_blocks_per_sm)
#define PW_UNROLL _Pragma("unroll")
#define PW_NO_UNROLL _Pragma("unroll 1")
#define PW_PRAGMA(x) _Pragma(#x)
#define PW_UNROLL_BY(n) PW_PRAGMA(unroll n)

// Code for sm_90a alone: its devices have 227 KiB of shared memory a block.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PW_SHARED_MEMORY_IS_LARGE 1
#endif

namespace pagewire {

extern __shared__ Vec16 pagewire_shared_memory[];

PW_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PW_DEVICE uint32_t block_x() { return blockIdx.x; }
PW_DEVICE uint32_t block_y() { return blockIdx.y; }
PW_DEVICE uint32_t grid_x() { return gridDim.x; }
PW_DEVICE char* shared_memory() { return reinterpret_cast<char*>(pagewire_shared_memory); }

// ----------------------------------------------------------------------------- barriers, warps

PW_DEVICE void sync_block() { __syncthreads(); }
PW_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
PW_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
PW_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
PW_DEVICE T shuffle_up(T value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(delta));
}
PW_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// Adds one, but goes from `last` to 0; returns the old value. Orders memory between blocks: with a
// block barrier before it, what the block has written is seen by whoever counts later; with one
// after it, the block sees what those have written that counted earlier.
PW_DEVICE int count_up_to(int* p, int last) {
    int old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(last) : "memory");
    return old;
}
PW_DEVICE void atomic_max(int64_t* p, int64_t value) {
    atomicMax(reinterpret_cast<long long*>(p), static_cast<long long>(value));
}

// -------------------------------------------------------------------------------------- memory

PW_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

template <class T>
PW_DEVICE T load_shared(const T* p) {
    return *p;
}
template <class T>
PW_DEVICE void store_shared(T* p, T value) {
    *p = value;
}

template <class T>
PW_DEVICE T load_global(const T* p) {
    return *p;
}
template <class T>
PW_DEVICE void store_global(T* p, T value) {
    *p = value;
}
// Data that other blocks of this launch wrote: not through this SM's L1.
template <class T>
PW_DEVICE T load_global_fresh(const T* p) {
    return __ldcg(p);
}
template <>
PW_DEVICE Vec16 load_global_fresh<Vec16>(const Vec16* p) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
}

// Read once, not worth a place in L1.
PW_DEVICE Vec16 load_streaming(const Vec16* p) {
    Vec16 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
                 : "l"(p));
    return v;
}
PW_DEVICE void store_streaming(Vec16* p, Vec16 v) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.x[0], v.x[1], v.x[2], v.x[3]));
}

// An L2 policy for bytes that are read once: they leave before anything else does.
PW_DEVICE uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// For bytes that are read again.
PW_DEVICE uint64_t evict_normal_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes of shared memory from `bytes` of global memory and zeros, past registers and L1.
PW_DEVICE void copy_async_16(void* shared, const void* global, int bytes, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "l"(policy)
                 : "memory");
}
PW_DEVICE void copy_async_4(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
PW_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kInFlight of this thread's newest groups are still under way.
template <int kInFlight>
PW_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// --------------------------------------------------------------------------------- tensor core

// Four 8x8 matrices of 16-bit values; lane 8i + r gives the address of row r of matrix i.
PW_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
PW_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c[16x8] += a[16x16] b[16x8], fp32 accumulators, fp16 or bf16 operands.
template <bool kBFloat16>
PW_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kBFloat16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// ---------------------------------------------------------------------------------- arithmetic

PW_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PW_DEVICE float log2_fast(float x) { return __log2f(x); }
PW_DEVICE float exp_exact(float x) { return expf(x); }
PW_DEVICE float log_exact(float x) { return logf(x); }
PW_DEVICE float tanh_exact(float x) { return tanhf(x); }
PW_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }  // IEEE, whatever -use_fast_math
PW_DEVICE float round_even(float x) { return rintf(x); }
PW_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
PW_DEVICE float float_from_bits(uint32_t x) { return __uint_as_float(x); }
PW_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Two floats to two 16-bit values, round to nearest even; `low` in the low half.
PW_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE uint32_t pack_float16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE float float_from_float16(uint16_t bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define PW_HAS_FLOAT8 1
// Two fp8 values in the low 16 bits to two fp16 values, exact.
PW_DEVICE uint32_t float16_from_e4m3(uint32_t two) {
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(static_cast<uint16_t>(two)));
    return r;
}
// Two floats to two fp8 values, saturating, round to nearest even; NaN is 0x7f, without a sign.
PW_DEVICE uint32_t pack_e4m3(float low, float high) {
    uint16_t r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
PW_DEVICE uint32_t pack_e5m2(float low, float high) {
    uint16_t r;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// Bytes chosen by the four nibbles of `selector` out of b:a.
PW_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

}  // namespace pagewire
