// Prints the blocks of every attention kernel: what csrc/cuda/attention says of them, for machine_code/kernels.py.
#include <cstdio>
#include <cstdlib>

#include "cuda/attention/shape_sm90.h"

using namespace pagewire;

// function, type, numbers and flags of the template; threads, stages, bytes of a stage, bytes of a block
template <class S, class Memory>
void print(const char* kernel, size_t of_a_block, size_t of_a_multiprocessor) {
    const int stages = stages_that_fit(S::kMinBlocks, Memory::bytes, of_a_block, of_a_multiprocessor);
    std::printf("%s: %d %d %d %d %zu\n", kernel, S::kThreads, S::kMinBlocks, stages,
                static_cast<int>(sizeof(typename Memory::Stage)), Memory::bytes(stages));
}

template <class T, int kWidth>
void print_all(const char* type, size_t of_a_block, size_t of_a_multiprocessor) {
    char name[64];
    const auto named = [&](const char* function, const char* more) {
        std::snprintf(name, sizeof name, "%s %s-%d%s", function, type, kWidth, more);
        return name;
    };
    using Narrow = Shape<T, kWidth, false>;
    using Wide = Shape<T, kWidth, true>;
    print<Narrow, Shared<Narrow>>(named("decode_kernel", ""), of_a_block, of_a_multiprocessor);
    print<Wide, Shared<Wide>>(named("decode_kernel", "-wide"), of_a_block, of_a_multiprocessor);
    if constexpr (kFitsSm90<T, kWidth, 8>) {
        using S = ShapeSm90<T, kWidth, 8>;
        print<S, SharedSm90<S>>(named("decode_sm90_kernel", "-8"), of_a_block, of_a_multiprocessor);
    }
    if constexpr (kFitsSm90<T, kWidth, 16>) {
        using S = ShapeSm90<T, kWidth, 16>;
        print<S, SharedSm90<S>>(named("decode_sm90_kernel", "-16"), of_a_block, of_a_multiprocessor);
    }
}

template <class T>
void print_widths(const char* type, size_t of_a_block, size_t of_a_multiprocessor) {
    print_all<T, 64>(type, of_a_block, of_a_multiprocessor);
    print_all<T, 128>(type, of_a_block, of_a_multiprocessor);
    print_all<T, 256>(type, of_a_block, of_a_multiprocessor);
}

int main(int argc, char** argv) {
    if (argc != 3) return std::printf("expected the bytes of shared memory of a block and of a multiprocessor\n"), 1;
    const size_t of_a_block = std::strtoul(argv[1], nullptr, 10), of_a_multiprocessor = std::strtoul(argv[2], nullptr, 10);
    print_widths<BFloat16>("bfloat16", of_a_block, of_a_multiprocessor);
    print_widths<Float16>("float16", of_a_block, of_a_multiprocessor);
    print_widths<Float8E4M3>("float8_e4m3fn", of_a_block, of_a_multiprocessor);
    print_widths<Float8E5M2>("float8_e5m2", of_a_block, of_a_multiprocessor);
    print_widths<int8_t>("int8", of_a_block, of_a_multiprocessor);
}
