#include <cstdint>

#include "cpu/kernels.h"
#include "pagewire/dispatch.h"

namespace pagewire::cpu {
namespace {

#include "cpu/simd_scalar.h"
#include "cpu/tails-inl.h"
#include "cpu/math-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/keys-inl.h"
#include "cpu/few_rows-inl.h"
#include "cpu/fma_rows-inl.h"
#include "cpu/tile-inl.h"
#include "cpu/merge-inl.h"
#include "cpu/move-inl.h"
#include "cpu/target-inl.h"

}  // namespace

const Kernels kScalar = {"scalar", attend_few_rows, attend_tile, merge_states, move_rows, read};

}  // namespace pagewire::cpu
