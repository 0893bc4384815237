// Divisor and quotient() against what a CPU divides. `arithmetic NAME` prints how many were compared, or the first that
// differs.
#include <cstdio>
#include <cstring>
#include <random>

#include "cuda/divisor.h"
#include "cuda/quotient.h"
#include "cuda/words.h"

using namespace pagewire;

namespace {

std::mt19937_64 random_bits(20261128);

template <class N>
bool divisors(long& compared) {
    constexpr int kBits = std::numeric_limits<N>::digits - 1;  // of a dividend
    constexpr N kTop = N(1) << kBits;
    const auto any = [](N below) { return static_cast<N>(static_cast<N>(random_bits()) % below); };
    const auto check = [&](N d) {
        const Divisor<N> by(static_cast<int64_t>(d));
        for (int i = 0; i < 400; ++i) {
            const N multiple = any(kTop) / d * d;
            const N numbers[] = {N(i), N(kTop - 1 - N(i)), any(kTop), multiple, multiple ? N(multiple - 1) : N(0)};
            for (const N n : numbers) {
                if (by.quotient(n) != n / d) {
                    std::printf("%llu / %llu\n", static_cast<unsigned long long>(n),
                                static_cast<unsigned long long>(d));
                    return false;
                }
                ++compared;
            }
        }
        return true;
    };
    for (N d = 1; d < 2000; ++d) {
        if (!check(d) || !check(kTop - d)) return false;
    }
    for (int b = 2; b < kBits; ++b) {
        for (N d = (N(1) << b) - 2; d <= (N(1) << b) + 2; ++d) {
            if (!check(d)) return false;
        }
        for (int i = 0; i < 40; ++i) {
            if (!check(any(N(1) << b) + 1)) return false;
        }
    }
    // no page has 0 tokens, but a cache may have no pages
    return Divisor<N>(0).quotient(7) == 7 && Divisor<N>(INT64_MAX).quotient(kTop - 1) == (sizeof(N) == 8);
}

float of_bits(int exponent, uint32_t mantissa) {
    return float_from_bits(uint32_t(exponent) << 23 | (mantissa & 0x7fffff) | (random_bits() % 2 ? 0x80000000 : 0));
}

// At the ends and in the middle of a binade as often as anywhere.
uint32_t mantissa() {
    constexpr uint32_t kEdges[] = {0, 1, 2, 0x3fffff, 0x400000, 0x400001, 0x7ffffe, 0x7fffff};
    const auto i = random_bits() % 16;
    return i < 8 ? kEdges[i] : static_cast<uint32_t>(random_bits());
}

// What decides: the codes of all 8-bit dtypes; and every bit where quotient.h says so.
bool same(float x, float divisor, bool& was_plain) {
    const Reciprocal by = reciprocal_of(divisor);
    was_plain = is_plain(by, x == x ? magnitude(x) : 0.0f);
    const float got[4] = {was_plain ? quotient(x, by) : any_quotient(x, by), any_quotient(x, by)};
    const float expected[4] = {divide(x, divisor), divide(x, divisor)};
    const auto codes = [](const float (&q)[4]) {
        return uint64_t(word_of<Float8E4M3>(q)) << 48 ^ uint64_t(word_of<Float8E5M2>(q)) << 24 ^ word_of<int8_t>(q);
    };
    const bool exact = was_plain && x == x && (x == 0.0f || magnitude(expected[0]) >= 0x1p-40f);
    return codes(got) == codes(expected) && (!exact || float_bits(got[0]) == float_bits(expected[0]));
}

bool quotients(long& compared) {
    long plain = 0;
    for (int of_x = 0; of_x < 256; ++of_x) {
        for (int of_divisor = 0; of_divisor < 256; ++of_divisor) {
            for (int i = 0; i < 400; ++i) {
                const float x = of_bits(of_x, mantissa()), divisor = of_bits(of_divisor, mantissa());
                bool was_plain;
                if (!same(x, divisor, was_plain)) {
                    std::printf("%a / %a\n", static_cast<double>(x), static_cast<double>(divisor));
                    return false;
                }
                ++compared;
                plain += was_plain;
            }
        }
    }
    // half of the divisors are positive, as every scale is, and half of their exponents middling
    return plain > compared / 8;
}

}  // namespace

int main(int argc, char** argv) {
    long compared = 0;
    const char* name = argc > 1 ? argv[1] : "";
    const bool all_same = std::strcmp(name, "divisors32") == 0   ? divisors<uint32_t>(compared)
                          : std::strcmp(name, "divisors64") == 0 ? divisors<uint64_t>(compared)
                          : std::strcmp(name, "quotients") == 0  ? quotients(compared)
                                                                 : false;
    if (all_same) std::printf("%ld equal\n", compared);
    return all_same ? 0 : 1;
}
