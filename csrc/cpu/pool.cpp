#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

namespace pagewire::cpu {
namespace {

// Waking a sleeping thread takes some 50 microseconds, as long as a short call: who waits looks a
// few times before sleeping, and lets others run between the looks.
constexpr std::chrono::microseconds kLooking{200};

template <class Condition>
void look_for(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + kLooking;
    while (!condition() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

struct Job {
    Task task;
    void* context;
    int64_t num_tasks;
    int max_threads;
    std::atomic<int64_t> next{0};
    int threads = 1;              // thread 0 is the caller's; guarded by the pool's mutex
    std::atomic<int> running{0};  // workers inside; changed with the pool's mutex held
    std::condition_variable done{};

    void work(int thread) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) task(context, i, thread);
    }
    bool wants_help() const { return threads < max_threads && next.load(std::memory_order_relaxed) < num_tasks; }
};

class Pool {
  public:
    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            grow(job.max_threads - 1);
            jobs_.push_back(&job);
            posted_.fetch_add(1, std::memory_order_relaxed);
        }
        wake_.notify_all();
        job.work(0);
        look_for([&] { return job.running.load(std::memory_order_relaxed) == 0; });
        std::unique_lock<std::mutex> lock(mutex_);
        jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
        job.done.wait(lock, [&] { return job.running == 0; });
    }

  private:
    void grow(int num_workers) {  // with the mutex held
        while (num_workers_ < num_workers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // the machine gives no more threads: the caller does the work
            }
            ++num_workers_;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            const auto wanted = [&] {
                return std::find_if(jobs_.begin(), jobs_.end(), [](Job* j) { return j->wants_help(); });
            };
            auto found = wanted();
            if (found == jobs_.end()) {
                const uint64_t seen = posted_.load(std::memory_order_relaxed);
                lock.unlock();
                look_for([&] { return posted_.load(std::memory_order_relaxed) != seen; });
                lock.lock();
                found = wanted();
            }
            if (found == jobs_.end()) {
                wake_.wait(lock);
                continue;
            }
            Job& job = **found;
            const int thread = job.threads++;
            ++job.running;
            lock.unlock();
            job.work(thread);
            lock.lock();
            if (--job.running == 0) job.done.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Job*> jobs_;
    std::atomic<uint64_t> posted_{0};  // jobs so far; changed with the mutex held
    int num_workers_ = 0;
};

// Never destroyed: workers may outlive static destruction. A forked child has no workers and
// perhaps a locked mutex, so it starts over with a pool of its own.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    static std::atomic<int> owner{0};
    static std::mutex making;
    const int pid = getpid();
    if (owner.load(std::memory_order_acquire) != pid) {
        std::lock_guard<std::mutex> lock(making);
        if (owner.load(std::memory_order_relaxed) != pid) {
            current.store(new Pool, std::memory_order_relaxed);
            owner.store(pid, std::memory_order_release);
        }
    }
    return *current.load(std::memory_order_relaxed);
}

}  // namespace

void parallel_for(int num_threads, int64_t num_tasks, Task task, void* context) {
    const int threads = int(std::min<int64_t>(num_threads, num_tasks));
    if (threads <= 1) {
        for (int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
        return;
    }
    Job job{task, context, num_tasks, threads};
    pool().run(job);
}

}  // namespace pagewire::cpu
