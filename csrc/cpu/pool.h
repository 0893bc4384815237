// A small pool of threads of our own: OpenMP in a wheel would load a second runtime next to torch's.
#pragma once

#include <cstdint>

namespace pagewire::cpu {

using Task = void (*)(void* context, int64_t index, int thread);

// Runs task(context, i, thread) for i in [0, num_tasks) on at most num_threads threads, the caller
// among them; thread is below num_threads and distinct between threads that run at the same time.
// Tasks must not throw. Safe to call from several threads at once and after a fork.
void parallel_for(int num_threads, int64_t num_tasks, Task task, void* context);

template <class Body>
void parallel_for(int num_threads, int64_t num_tasks, Body&& body) {
    parallel_for(
        num_threads, num_tasks, [](void* context, int64_t i, int thread) { (*static_cast<Body*>(context))(i, thread); },
        &body);
}

}  // namespace pagewire::cpu
