// Compiled kernels started again: what every call has in common is kept, a call brings its addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "host/driver.h"

namespace pagewire::host {

// Which parameter is an address of the call.
struct Place {
    size_t parameter;
    size_t address;   // of the call's addresses
    uint64_t offset;  // bytes behind it
};

// Which parameter is a tensor of the call as a matrix that the TMA unit reads in boxes, swizzled in 128 or 64 bytes: with
// a box's rows side by side in shared memory, as wgmma wants them.
struct Matrix {
    size_t parameter;
    size_t address;  // of the call's addresses
    int type;        // CUtensorMapDataType
    uint64_t rows, columns, row_bytes;
    uint32_t box_rows, box_columns, swizzle_bytes;
};

struct Launch {
    std::string name;
    void* function;  // CUfunction
    unsigned grid[3], num_threads, shared_bytes;
    std::vector<uint64_t> parameters;  // each in the lowest bytes; more than the kernel has do no harm
    std::vector<Place> places;
    std::vector<Matrix> matrices;
};

// Starts all of them, in order, on a stream. May be called by several threads at once.
// Throws std::runtime_error, which names the kernel, if the driver refuses one.
void start(const Driver& driver, const std::vector<Launch>& launches, const uint64_t* addresses, void* stream);

}  // namespace pagewire::host
