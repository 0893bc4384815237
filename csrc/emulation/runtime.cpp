#include "emulation/runtime.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace pagewire::runtime {

namespace {

std::mutex mutex;
std::map<std::pair<int, const void*>, size_t> shared_limits;  // (device, kernel) -> bytes

int from_environment(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

std::string bytes(size_t n) { return std::to_string(n) + " bytes of shared memory"; }

[[noreturn]] void refuse(const std::string& name, const std::string& error, const std::string& why) {
    throw emulation::Fault(name + ": " + error + " (" + why + ")");
}

}  // namespace

int architecture() { return from_environment("PAGEWIRE_EMULATION_ARCH", 90); }

int num_multiprocessors() { return from_environment("PAGEWIRE_EMULATION_SMS", 4); }

Limits limits_of(int arch) {
    switch (arch) {
        case 80:
        case 87:
            return {163 << 10, 164 << 10, arch == 80 ? 2048 : 1536, arch == 80 ? 32 : 16};
        case 86:
        case 89:
        case 120:
        case 121:
            return {99 << 10, 100 << 10, 1536, arch == 86 ? 16 : 24};
        case 90:
        case 100:
        case 103:
        case 110:
            return {227 << 10, 228 << 10, arch == 110 ? 1536 : 2048, arch == 110 ? 24 : 32};
        default:
            throw emulation::Fault(
                "PAGEWIRE_EMULATION_ARCH: expected 80, 86, 87, 89, 90, 100, 103, "
                "110, 120 or 121, got " +
                std::to_string(arch));
    }
}

void raise_shared_memory_limit(const void* kernel) {
    const int arch = architecture();
    std::lock_guard<std::mutex> lock(mutex);
    shared_limits[{arch, kernel}] = limits_of(arch).shared_of_a_block;
}

int blocks_that_fit(int num_threads, size_t shared_bytes) {
    const Limits limits = limits_of(architecture());
    if (shared_bytes > limits.shared_of_a_block || num_threads > emulation::Block::kMaxThreads) return 0;
    const size_t of_a_block = (shared_bytes + kSharedUnit - 1) / kSharedUnit * kSharedUnit + kSharedOfTheSystem;
    const auto by_shared = static_cast<int>(limits.shared_of_a_multiprocessor / of_a_block);
    return std::min({by_shared, limits.threads_of_a_multiprocessor / num_threads, limits.blocks_of_a_multiprocessor});
}

void check_launch(const void* kernel, const char* name, int64_t grid_x, int64_t grid_y, int num_threads,
                  size_t shared_bytes, size_t parameter_bytes) {
    if (grid_x < 1 || grid_x > kMaxGridX || grid_y < 1 || grid_y > kMaxGridY) {
        refuse(name, "invalid configuration argument",
               std::to_string(grid_x) + " x " + std::to_string(grid_y) + " blocks");
    }
    if (num_threads < 1 || num_threads > emulation::Block::kMaxThreads) {
        refuse(name, "invalid configuration argument", "blocks of " + std::to_string(num_threads) + " threads");
    }
    if (parameter_bytes > kMaxParameterBytes) {
        refuse(name, "invalid argument",
               std::to_string(parameter_bytes) + " bytes of parameters, at most " + std::to_string(kMaxParameterBytes));
    }
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = shared_limits.find({architecture(), kernel});
    const size_t limit = found == shared_limits.end() ? kSharedWithoutAsking : found->second;
    if (shared_bytes > limit) {
        refuse(name, "invalid argument", bytes(shared_bytes) + ", the kernel's limit is " + std::to_string(limit));
    }
}

}  // namespace pagewire::runtime
