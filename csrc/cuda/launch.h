// Launching without <<<>>>: the same host code starts a kernel on a GPU or under the emulation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/device/thread.h"

#if defined(PAGEWIRE_EMULATE)
#include "emulation/runtime.h"
#else
#include "cuda/runtime_gpu.h"
#endif

namespace pagewire {

struct LaunchConfig {
    const char* name;  // of the kernel, for messages
    int64_t grid_x, grid_y;
    int num_threads;
    size_t shared_bytes;
    uintptr_t stream;
};

// Makes `device` current for this thread while in scope.
class UseDevice {
  public:
    explicit UseDevice(int device) : previous_(runtime::current_device()), own_(device) {
        if (own_ != previous_) runtime::use_device(own_);
    }
    ~UseDevice() {
        if (own_ != previous_) runtime::leave_device(previous_);
    }
    UseDevice(const UseDevice&) = delete;
    UseDevice& operator=(const UseDevice&) = delete;

  private:
    int previous_, own_;
};

// A block may ask for 48 KiB of shared memory unless its kernel's limit was raised. Raised once per
// kernel and device, to all that the device has: a limit that followed the launches could be too
// low for one that was prepared before another.
template <class... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...)) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*> > allowed;
    std::lock_guard<std::mutex> lock(mutex);
    const std::pair<int, const void*> key{runtime::current_device(), reinterpret_cast<const void*>(kernel)};
    if (allowed.count(key)) return;
    runtime::raise_shared_memory_limit(kernel);
    allowed.insert(key);
}

// Blocks of this kernel that fit on one multiprocessor, at least one.
template <class... Parameters>
int blocks_per_multiprocessor(void (*kernel)(Parameters...), const char* name, int num_threads, size_t shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, size_t>, int> known;
    const size_t limit = runtime::shared_memory_of_a_block();
    if (shared_bytes > limit) {
        throw std::runtime_error(std::string("pagewire: ") + name + " needs " + std::to_string(shared_bytes) +
                                 " bytes of shared memory a block, this device (sm_" +
                                 std::to_string(runtime::architecture()) + ") has " + std::to_string(limit));
    }
    allow_shared_memory(kernel);
    std::lock_guard<std::mutex> lock(mutex);
    int& blocks = known[{runtime::current_device(), reinterpret_cast<const void*>(kernel), shared_bytes}];
    if (blocks == 0) blocks = runtime::blocks_of_a_multiprocessor(kernel, num_threads, shared_bytes);
    if (blocks == 0) {
        throw std::runtime_error(std::string("pagewire: ") + name + " with " + std::to_string(num_threads) +
                                 " threads and " + std::to_string(shared_bytes) +
                                 " bytes of shared memory does not fit on this device (sm_" +
                                 std::to_string(runtime::architecture()) + ")");
    }
    return blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& c, const Arguments&... arguments) {
    runtime::start(kernel, c.name, c.grid_x, c.grid_y, c.num_threads, c.shared_bytes, c.stream, arguments...);
}

}  // namespace pagewire
