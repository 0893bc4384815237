// The little that is asked of the CUDA driver, found at run time: this loads, and is built, where there is none.
#pragma once

#include <cstdint>
#include <string>

namespace pagewire::host {

struct Driver {
    using Result = int;  // CUresult; 0: fine

    Result (*get_context)(void** context);  // cuCtxGetCurrent
    Result (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                     void** extra);                 // cuLaunchKernel
    Result (*get_text)(Result, const char** text);  // cuGetErrorString
    Result (*encode)(void* map, int type, uint32_t rank, void* address, const uint64_t* shape, const uint64_t* strides,
                     const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion,
                     int fill);  // cuTensorMapEncodeTiled

    // nullptr: there is no driver.
    static const Driver* loaded();

    // Whether this thread has a context. torch and Triton make one where they need it; a new thread has none.
    bool has_context() const {
        void* context = nullptr;
        return get_context(&context) == 0 && context != nullptr;
    }
    std::string text(Result error) const;
};

}  // namespace pagewire::host
