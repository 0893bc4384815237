// Where a call runs, and where its kernels report what they find.
#pragma once

#include <cstdint>

namespace pagewire {

struct Call {
    int device;
    uintptr_t stream;
    int64_t* error_word;
};

}  // namespace pagewire
