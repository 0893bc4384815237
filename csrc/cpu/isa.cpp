#include "cpu/isa.h"

#include <stdexcept>

namespace pagewire::cpu {

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        usable.push_back(&kAvx512);
    }
    if (avx2) usable.push_back(&kAvx2);
#elif defined(__aarch64__)
    usable.push_back(&kNeon);
#endif
    usable.push_back(&kScalar);
    return usable;
}

const Kernels& choose_kernels(const std::string& name) {
    const std::vector<const Kernels*> usable = usable_kernels();
    if (name.empty()) return *usable.front();
    std::string names;
    for (const Kernels* k : usable) {
        if (name == k->name) return *k;
        names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    throw std::invalid_argument("PAGEWIRE_CPU_ISA=" + name + ": this machine and build have " +
                                names);
}

}  // namespace pagewire::cpu
