// merge_state and merge_states: n attention states over disjoint keys become one.
#pragma once

#include "cuda/call.h"
#include "pagewire/params.h"

namespace pagewire {

void merge(const MergeParams& p, const Call& call);

}  // namespace pagewire
