#include "cpu/isa.h"

#include <stdexcept>

#ifdef PAGEWIRE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pagewire::cpu {

#ifdef PAGEWIRE_AMX
namespace {

// The processor has bf16 tiles, vector conversions and byte tables, and the kernel lets this process use the tile
// registers: one request holds for all its threads, also for those that run already.
bool tiles_permitted() {
    constexpr int kRequestPermission = 0x1023;  // of arch_prctl
    constexpr int kTileData = 18;               // of arch_prctl
    constexpr unsigned kAmxBf16 = 1u << 22;
    constexpr unsigned kAmxTile = 1u << 24;
    constexpr unsigned kAvx512Bf16 = 1u << 5;
    constexpr unsigned kAvx512Vbmi = 1u << 1;
    unsigned eax;
    unsigned ebx;
    unsigned ecx;
    unsigned edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
    if ((ecx & kAvx512Vbmi) == 0) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
    if ((eax & kAvx512Bf16) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef PAGEWIRE_AMX
        static const bool amx = tiles_permitted();
        if (amx) usable.push_back(&kAmx);
#endif
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
    throw std::invalid_argument("PAGEWIRE_CPU_ISA=" + name + ": this machine and build have " + names);
}

}  // namespace pagewire::cpu
