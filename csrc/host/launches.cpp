#include "host/launches.h"

#include <stdexcept>

namespace pagewire::host {
namespace {

void start(const Driver& driver, const Launch& l, const uint64_t* addresses, void* stream) {
    std::vector<uint64_t> values(l.parameters);  // a copy: another thread may be here
    for (const Place& place : l.places) values[place.parameter] = addresses[place.address] + place.offset;
    std::vector<void*> pointers(values.size());
    for (size_t i = 0; i < values.size(); ++i) pointers[i] = &values[i];
    const Driver::Result error = driver.launch(l.function, l.grid[0], l.grid[1], l.grid[2], l.num_threads, 1, 1,
                                               l.shared_bytes, stream, pointers.data(), nullptr);
    if (error != 0) throw std::runtime_error("pagewire: " + l.name + " could not be started: " + driver.text(error));
}

}  // namespace

void start(const Driver& driver, const std::vector<Launch>& launches, const uint64_t* addresses, void* stream) {
    for (const Launch& launch : launches) start(driver, launch, addresses, stream);
}

}  // namespace pagewire::host
