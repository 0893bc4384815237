// Runs the blocks of a grid one after another, a block's threads as fibers that switch only at
// collective operations and where they wait for an mbarrier. A TMA load lands as late as it may: when no thread can
// run and one waits for its mbarrier; one at a time, in the order of their issue, or against it in reverse.
//
// Reported as an exception that names kernel, block, thread and source line: barriers, mbarriers and warp
// operations that some threads never reach, misaligned vector accesses, arrivals and bytes that nobody expects, loads
// that outlive their block, and everything SharedMemory knows. A fault abandons the launch. What a device would refuse
// before a thread runs, runtime.h refuses: shared memory above the kernel's or the device's limit, empty or too large
// grids.
//
// What this cannot show, because one block runs at a time and memory is sequentially consistent:
//   - ordering between blocks: a missing __threadfence, a stale L1 line, a block that waits for a later one;
//   - races between threads on global memory, and their order (set PAGEWIRE_EMULATION_ORDER=reverse to run blocks and
//     threads backwards: a result that changes depends on it);
//   - register pressure, bank conflicts, occupancy, time.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/mbarriers.h"
#include "emulation/order.h"
#include "emulation/shared_memory.h"
#include "emulation/tensor_map.h"

namespace pagewire::emulation {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Where {
    const char* file;
    int line;
    std::string name() const;
    static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Index3 {
    uint32_t x, y, z;
};

class Block {
  public:
    static constexpr int kWarp = 32;
    static constexpr int kMaxThreads = 1024;

    // The block that is running; kernels run nowhere else.
    static Block& running();

    void run_grid(const char* kernel, int architecture, Index3 grid, int num_threads, size_t shared_bytes,
                  const std::function<void()>& body);

    int thread() const { return thread_; }
    int num_threads() const { return num_threads_; }
    Index3 block() const { return block_; }
    Index3 grid() const { return grid_; }
    char* shared() { return shared_.data(); }

    void sync_block(Where where);

    // All 32 lanes arrive with their arguments; the last one runs `operation(arguments of every lane)`.
    template <class Arguments, class Operation>
    void collective(const char* name, Where where, Arguments& mine, Operation operation) {
        Warp& warp = warps_[thread_ / kWarp];
        arrive(warp, name, where, &mine);
        if (warp.num_arrived < kWarp) {
            suspend(name, where, kAtWarp);
            return;
        }
        warp.num_arrived = 0;
        operation(reinterpret_cast<Arguments**>(warp.arguments));
        release(thread_ / kWarp * kWarp, kWarp, kAtWarp);
    }
    void sync_warp(Where where) {
        int nothing = 0;
        collective("sync_warp", where, nothing, [&](int**) { order_.sync_warp(thread_ / kWarp); });
    }

    void check_shared_read(const void* p, size_t bytes, Where where, bool by_whole_warp = false) {
        report(shared_.read(p, bytes, thread_, by_whole_warp), where);
    }
    void check_shared_write(const void* p, size_t bytes, Where where) {
        report(shared_.write(p, bytes, thread_), where);
    }
    void check_alignment(const void* p, size_t bytes, Where where) {
        if (reinterpret_cast<uintptr_t>(p) % bytes) {
            report("misaligned access of " + std::to_string(bytes) + " bytes", where);
        }
    }

    // `size` bytes of shared memory, of which `bytes` come from global memory and the rest are zeros.
    void copy_async(void* shared, const void* global, int size, int bytes, Where where);
    void commit_copies();
    void wait_copies(size_t still_in_flight);
    void note_policy(int bytes, bool evict_first) {
        launched_.copied_bytes += bytes;
        if (evict_first) launched_.evict_first_bytes += bytes;
    }

    // mbarriers, by their place in shared memory, and what completes them: block_async.cpp
    void init_mbarrier(void* mbarrier, int64_t count, Where where);
    void arrive(void* mbarrier, Where where);
    void expect_bytes(void* mbarrier, int64_t bytes, Where where);
    void wait(void* mbarrier, int parity, Where where);
    void fence_mbarrier_init() { mbarriers_.publish(thread_, order_.tick()); }
    void fence_proxy_async() {
        order_.fence(thread_);
        fence_mbarrier_init();
    }
    void load_box(void* shared, const TensorMap* map, const std::array<int, 4>& corner, void* mbarrier, Where where);

    // What the last launch was, for tests.
    struct Launched {
        std::string kernel;
        Index3 grid;
        int num_threads;
        size_t shared_bytes;
        int64_t copied_bytes, evict_first_bytes;  // asynchronously
    };
    const Launched& launched() const { return launched_; }

    // Called after every block with the number of blocks that are done, until it is replaced: what
    // another stream might do to memory while a launch is under way.
    void after_each_block(std::function<void(uint64_t)> call) { after_block_ = std::move(call); }

    // Ends the launch with a Fault if `fault` says something.
    void report(const std::string& fault, Where where);

  private:
    enum State : uint8_t { kReady, kAtBlock, kAtWarp, kAtMbarrier, kDone };

    struct Copy {
        void* shared;
        const void* global;
        int size, bytes;
    };
    struct Thread {
        State state = kDone;
        const char* waits_at = "";
        Where where{"", 0};
        int mbarrier = 0;                       // it waits for
        std::vector<std::vector<Copy>> copies;  // committed groups, oldest first
        std::vector<Copy> uncommitted;
    };
    struct Load {  // issued, not landed
        TensorMap map;
        std::array<int, 4> corner;
        char* shared;
        int mbarrier;
        Where where;
    };
    struct Warp {
        int num_arrived = 0;
        const char* name = "";
        Where where{"", 0};
        void* arguments[kWarp] = {};
    };

    void run_block();
    static void enter(void* self);
    std::string place() const;
    void run_ready_threads();
    void arrive(Warp& warp, const char* name, Where where, void* arguments);
    void suspend(const char* name, Where where, State state);
    void release(int first, int count, State waiting);
    void land(Thread& thread, std::vector<Copy>& group);
    int mbarrier_of(void* p, const char* doing, Where where);
    bool land_a_load();
    void complete(int mbarrier);
    std::string stuck() const;
    std::string unfinished() const;
    void require_architecture(int least, const char* instruction, Where where);

    std::string kernel_;
    int architecture_ = 0;
    Index3 grid_{}, block_{};
    int num_threads_ = 0, thread_ = 0;
    size_t shared_bytes_ = 0;
    bool reverse_ = false;
    const std::function<void()>* body_ = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Order order_;
    int num_at_block_ = 0;
    Where block_where_{"", 0};
    SharedMemory shared_{order_};
    Mbarriers mbarriers_;
    std::vector<Load> loads_;  // oldest first
    std::string fault_;
    Launched launched_{};
    std::function<void(uint64_t)> after_block_;
};

}  // namespace pagewire::emulation
