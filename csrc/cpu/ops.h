// The ops on a CPU: check every index, plan, run on the pool.
#pragma once

#include "cpu/kernels.h"
#include "pagewire/params.h"

namespace pagewire::cpu {

// All throw BadIndex before anything is written.
void attention(const AttentionParams& p, const Kernels& kernels, int num_threads);
void merge_states(const MergeParams& p, const Kernels& kernels, int num_threads);
void move(const MoveParams& p, const Kernels& kernels, int num_threads);
// Reads `count` floats on all threads; benchmarks time it. Returns their maximum.
float read(const float* data, int64_t count, const Kernels& kernels, int num_threads);

}  // namespace pagewire::cpu
