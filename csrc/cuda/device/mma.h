// Tensor core steps of 16 x 8 x 16 with fp32 sums, and how their operands get into registers.
#pragma once

#include <cstring>

#include "cuda/device/arithmetic.h"
#include "cuda/device/memory.h"

#if defined(PAGEWIRE_EMULATE)

namespace pagewire {

namespace emulation {

inline float float_of_half(uint32_t two, int which, bool bfloat16) {
    const auto h = static_cast<uint16_t>(two >> (16 * which));
    return bfloat16 ? float_from_bits(uint32_t(h) << 16) : float_of_float16(h);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Where where) {
    struct Lane {
        const void* row;
        uint32_t* r;
    } mine{row, r};
    Block& block = Block::running();
    block.check_alignment(row, 16, where);
    block.check_shared_read(row, 16, where, /*by_whole_warp=*/true);
    block.collective("ldmatrix", where, mine, [transposed](Lane** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t m[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(m[i], lanes[8 * matrix + i]->row, 16);
            for (int lane = 0; lane < Block::kWarp; ++lane) {
                const int g = lane / 4, t = lane % 4 * 2;
                lanes[lane]->r[matrix] =
                    transposed ? m[t][g] | uint32_t(m[t + 1][g]) << 16 : m[g][t] | uint32_t(m[g][t + 1]) << 16;
            }
        }
    });
}

}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
    emulation::load_matrices(r, row, false, where);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Where where = Where::here()) {
    emulation::load_matrices(r, row, true, where);
}

inline uint32_t transpose_matrix(uint32_t two, Where where = Where::here()) {
    struct Lane {
        uint32_t two, result;
    } mine{two, 0};
    Block::running().collective("movmatrix", where, mine, [](Lane** lanes) {
        const auto element = [&](int row, int column) {
            return lanes[row * 4 + column / 2]->two >> (16 * (column % 2)) & 0xffff;
        };
        for (int lane = 0; lane < Block::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            lanes[lane]->result = element(t, g) | element(t + 1, g) << 16;
        }
    });
    return mine.result;
}

template <bool kBFloat16>
inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                Where where = Where::here()) {
    struct Lane {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } mine{c, a, {b0, b1}};
    Block::running().collective("mma", where, mine, [](Lane** lanes) {
        float A[16][16], B[8][16];  // B transposed: the sums below run over contiguous memory
        for (int lane = 0; lane < Block::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                for (int h = 0; h < 2; ++h) {
                    A[g + 8 * (i % 2)][t + h + 8 * (i / 2)] = emulation::float_of_half(lanes[lane]->a[i], h, kBFloat16);
                }
            }
            for (int i = 0; i < 2; ++i) {
                for (int h = 0; h < 2; ++h) {
                    B[g][t + h + 8 * i] = emulation::float_of_half(lanes[lane]->b[i], h, kBFloat16);
                }
            }
        }
        for (int lane = 0; lane < Block::kWarp; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; ++i) {
                const float* row = A[g + 8 * (i / 2)];
                const float* column = B[t + i % 2];
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
                lanes[lane]->c[i] += sum;
            }
        }
    });
}

}  // namespace pagewire

#else

namespace pagewire {

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

// An 8x8 matrix of 16-bit values, a lane's two side by side in row lane / 4, transposed into the same layout.
PW_DEVICE uint32_t transpose_matrix(uint32_t two) {
    uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
    return result;
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

}  // namespace pagewire

#endif
