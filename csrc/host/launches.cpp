#include "host/launches.h"

#include <stdexcept>

namespace pagewire::host {
namespace {

struct alignas(64) TensorMap {  // CUtensorMap
    uint64_t opaque[16];
};

TensorMap encoded(const Driver& driver, const Launch& l, const Matrix& m, uint64_t address) {
    constexpr int kNoInterleave = 0;
    constexpr int kSwizzle64B = 2;
    constexpr int kSwizzle128B = 3;
    constexpr int kPromote128B = 2;
    constexpr int kZeros = 0;
    TensorMap map{};
    const uint64_t shape[] = {m.columns, m.rows};
    const uint64_t strides[] = {m.row_bytes};
    const uint32_t box[] = {m.box_columns, m.box_rows};
    const uint32_t element_strides[] = {1, 1};
    const int swizzle = m.swizzle_bytes == 64 ? kSwizzle64B : kSwizzle128B;
    const Driver::Result error = driver.encode(&map, m.type, 2, reinterpret_cast<void*>(address), shape, strides, box,
                                               element_strides, kNoInterleave, swizzle, kPromote128B, kZeros);
    if (error != 0) throw std::runtime_error("pagewire: a matrix of " + l.name + ": " + driver.text(error));
    return map;
}

void start(const Driver& driver, const Launch& l, const uint64_t* addresses, void* stream) {
    std::vector<uint64_t> values(l.parameters);  // a copy: another thread may be here
    for (const Place& place : l.places) values[place.parameter] = addresses[place.address] + place.offset;
    std::vector<void*> pointers(values.size());
    for (size_t i = 0; i < values.size(); ++i) pointers[i] = &values[i];
    std::vector<TensorMap> maps;
    maps.reserve(l.matrices.size());  // pointers stay
    for (const Matrix& m : l.matrices) {
        maps.push_back(encoded(driver, l, m, addresses[m.address]));
        pointers[m.parameter] = &maps.back();
    }
    const Driver::Result error = driver.launch(l.function, l.grid[0], l.grid[1], l.grid[2], l.num_threads, 1, 1,
                                               l.shared_bytes, stream, pointers.data(), nullptr);
    if (error != 0) throw std::runtime_error("pagewire: " + l.name + " could not be started: " + driver.text(error));
}

}  // namespace

void start(const Driver& driver, const std::vector<Launch>& launches, const uint64_t* addresses, void* stream) {
    for (const Launch& launch : launches) start(driver, launch, addresses, stream);
}

}  // namespace pagewire::host
