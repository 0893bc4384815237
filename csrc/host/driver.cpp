#include "host/driver.h"

#include <dlfcn.h>

namespace pagewire::host {
namespace {

template <class Function>
bool find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    return function != nullptr;
}

const Driver* load() {
    static Driver driver;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    const bool complete = library != nullptr && find(library, "cuCtxGetCurrent", driver.get_context) &&
                          find(library, "cuLaunchKernel", driver.launch) &&
                          find(library, "cuGetErrorString", driver.get_text) &&
                          find(library, "cuTensorMapEncodeTiled", driver.encode);
    return complete ? &driver : nullptr;
}

}  // namespace

const Driver* Driver::loaded() {
    static const Driver* const found = load();
    return found;
}

std::string Driver::text(Result error) const {
    const char* words = nullptr;
    const bool known = get_text(error, &words) == 0 && words != nullptr;
    return "CUDA error " + std::to_string(error) + (known ? std::string(": ") + words : "");
}

}  // namespace pagewire::host
