// Division by a number the host knows: a multiplication and a shift, where a GPU's own takes twenty instructions in 32
// bits and seventy in 64.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/device/language.h"

namespace pagewire {

__extension__ using uint128_t = unsigned __int128;

// Of n < 2^(N-1), where N is the number of N's bits, 32 or 64. With 2^s the first power of two that is not below d,
// m = floor(2^(N-1+s) / d) + 1 exceeds 2^(N-1+s) / d by at most 1, so n * m / 2^(N-1+s) exceeds n / d by less than
// 1 / d: too little to reach the next integer.
template <class N>
struct Divisor {
    using Twice = std::conditional_t<sizeof(N) == 4, uint64_t, uint128_t>;
    static constexpr int kBits = std::numeric_limits<N>::digits;

    N divisor = 1, multiplier = 0;
    int shift = 0;

    Divisor() = default;
    // Of less than 1: as if 1. From 2^(N-1) on every quotient is 0.
    explicit Divisor(int64_t d) {
        const uint64_t at_least_one = static_cast<uint64_t>(std::max<int64_t>(d, 1));
        divisor = static_cast<N>(std::min<uint64_t>(at_least_one, std::numeric_limits<N>::max()));
        if (divisor >> (kBits - 1)) return;
        shift = std::bit_width(static_cast<N>(divisor - 1));
        multiplier = static_cast<N>((Twice(1) << (kBits - 1 + shift)) / divisor + 1);
    }

    PW_HOST_DEVICE N quotient(N n) const {
        return static_cast<N>(static_cast<N>(Twice(2 * n) * multiplier >> kBits) >> shift);
    }
};

}  // namespace pagewire
