#include "cpu/kernels.h"

#ifdef PAGEWIRE_AMX
#include <immintrin.h>
#include <cstdint>
#include <type_traits>

#include "pagewire/dispatch.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,avx512vbmi,amx-tile,amx-bf16")

namespace pagewire::cpu {
namespace {

#include "cpu/simd_avx512.h"
#include "cpu/math-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/keys-inl.h"
#include "cpu/few_rows-inl.h"
#include "cpu/fma_rows-inl.h"
#include "cpu/tile-inl.h"
#include "cpu/merge-inl.h"
#include "cpu/move-inl.h"
#include "cpu/target-inl.h"
#include "cpu/amx-inl.h"
#include "cpu/amx_words-inl.h"
#include "cpu/amx_rows-inl.h"

}  // namespace

const Kernels kAmx = {"amx", attend_few_rows_bf16, attend_tile_bf16, merge_states, move_rows, read};

}  // namespace pagewire::cpu
#endif
