// The planes of a block: all layers of K, then all layers of V; a block has one run of them.
#pragma once

#include "cuda/device/thread.h"
#include "cuda/move/plan.h"

namespace pagewire::moving {

struct Run {  // of a part's layers
    int first, last;
};

template <int kLayers>
PW_DEVICE Run layers_of(const Plan<kLayers>& p, int part) {
    const int first = static_cast<int>(block_y()) * p.planes_per_block - part * p.num_layers;
    const int last = first + p.planes_per_block;
    return {first < 0 ? 0 : first, last < p.num_layers ? last : p.num_layers};
}

}  // namespace pagewire::moving
