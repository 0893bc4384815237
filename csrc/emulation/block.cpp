#include "emulation/block.h"

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace pagewire::emulation {

namespace {

std::mutex one_launch_at_a_time;

std::string name_of(Where where) {
    const char* slash = std::strrchr(where.file, '/');
    return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

}  // namespace

Block& Block::running() {
    static Block block;
    return block;
}

void Block::run_grid(const char* kernel, Index3 grid, int num_threads, size_t shared_bytes,
                     const std::function<void()>& body) {
    std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    if (num_threads % kWarp) {
        throw Fault(std::string(kernel) + ": the emulation runs whole warps, not " + std::to_string(num_threads) +
                    " threads");
    }
    launched_ = {kernel, grid, num_threads, shared_bytes, 0, 0};
    kernel_ = kernel;
    grid_ = grid;
    num_threads_ = num_threads;
    shared_bytes_ = shared_bytes;
    body_ = &body;
    const char* order = std::getenv("PAGEWIRE_EMULATION_ORDER");
    reverse_ = order && std::string(order) == "reverse";
    while (static_cast<int>(fibers_.size()) < num_threads) {
        fibers_.push_back(std::make_unique<Fiber>());
    }
    const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t i = 0; i < num_blocks; ++i) {
        const uint64_t at = reverse_ ? num_blocks - 1 - i : i;
        block_ = {static_cast<uint32_t>(at % grid.x), static_cast<uint32_t>(at / grid.x % grid.y),
                  static_cast<uint32_t>(at / grid.x / grid.y)};
        run_block();
        if (after_block_) after_block_(i + 1);
    }
}

void Block::run_block() {
    const auto n = static_cast<size_t>(num_threads_);
    threads_.assign(n, Thread{});
    warps_.assign(n / kWarp, Warp{});
    epochs_.assign(n / kWarp, 0);
    block_epoch_ = 0;
    num_at_block_ = 0;
    fault_.clear();
    shared_.reset(shared_bytes_);
    for (size_t t = 0; t < n; ++t) {
        threads_[t].state = kReady;
        fibers_[t]->start(&Block::enter, this);
    }
    for (bool progress = true; progress;) {
        progress = false;
        for (int i = 0; i < num_threads_; ++i) {
            const int t = reverse_ ? num_threads_ - 1 - i : i;
            if (threads_[static_cast<size_t>(t)].state != kReady) continue;
            progress = true;
            thread_ = t;
            fibers_[static_cast<size_t>(t)]->resume();
            if (!fault_.empty()) throw Fault(fault_);
        }
    }
    for (const Thread& t : threads_) {
        if (t.state != kDone) throw Fault(kernel_ + ": " + stuck());
    }
}

void Block::enter(void* self) {
    Block& block = *static_cast<Block*>(self);
    (*block.body_)();
    block.threads_[static_cast<size_t>(block.thread_)].state = kDone;
}

std::string Block::stuck() const {
    std::string text = "divergent barrier: ";
    for (State state : {kAtBlock, kAtWarp, kDone}) {
        for (size_t t = 0; t < threads_.size(); ++t) {
            const Thread& thread = threads_[t];
            if (thread.state != state) continue;
            text += "thread " + std::to_string(t) +
                    (state == kDone ? " has returned"
                                    : std::string(" waits in ") + thread.waits_at + " at " + name_of(thread.where));
            text += "; ";
            break;  // one of each kind tells the story
        }
    }
    return text + "block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " +
           std::to_string(block_.z) + ")";
}

void Block::report(const std::string& fault, Where where) {
    if (fault.empty()) return;
    fault_ = kernel_ + ": block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " +
             std::to_string(block_.z) + ") thread " + std::to_string(thread_) + " " + fault + " (" + name_of(where) +
             ")";
    fibers_[static_cast<size_t>(thread_)]->yield();  // and is never resumed
}

void Block::wait(const char* name, Where where, State state) {
    Thread& thread = threads_[static_cast<size_t>(thread_)];
    thread.state = state;
    thread.waits_at = name;
    thread.where = where;
    fibers_[static_cast<size_t>(thread_)]->yield();
}

void Block::release(int first, int count, State waiting) {
    for (int t = first; t < first + count; ++t) {
        State& state = threads_[static_cast<size_t>(t)].state;
        if (state == waiting) state = kReady;
    }
}

void Block::arrive(Warp& warp, const char* name, Where where, void* arguments) {
    if (warp.num_arrived == 0) {
        warp.name = name;
        warp.where = where;
    } else if (std::strcmp(warp.name, name) || warp.where.line != where.line) {
        report("divergent barrier: reaches " + std::string(name) + " while its warp is in " + warp.name + " at " +
                   name_of(warp.where),
               where);
    }
    warp.arguments[thread_ % kWarp] = arguments;
    ++warp.num_arrived;
}

void Block::sync_block(Where where) {
    if (num_at_block_ == 0) {
        block_where_ = where;
    } else if (block_where_.line != where.line) {
        report("divergent barrier: reaches sync_block while others wait at " + name_of(block_where_), where);
    }
    if (++num_at_block_ < num_threads_) {
        wait("sync_block", where, kAtBlock);
        return;
    }
    num_at_block_ = 0;
    ++block_epoch_;
    for (uint32_t& epoch : epochs_) ++epoch;
    release(0, num_threads_, kAtBlock);
}

void Block::copy_async(void* shared, const void* global, int size, int bytes, Where where) {
    check_alignment(shared, static_cast<size_t>(size), where);
    if (bytes > 0) check_alignment(global, static_cast<size_t>(size), where);
    report(shared_.begin_copy(shared, static_cast<size_t>(size), thread_, epoch()), where);
    threads_[static_cast<size_t>(thread_)].uncommitted.push_back({shared, global, size, bytes});
}

void Block::commit_copies() {
    Thread& thread = threads_[static_cast<size_t>(thread_)];
    thread.copies.push_back(std::move(thread.uncommitted));
    thread.uncommitted.clear();
}

void Block::wait_copies(size_t still_in_flight) {
    Thread& thread = threads_[static_cast<size_t>(thread_)];
    while (thread.copies.size() > still_in_flight) {
        land(thread, thread.copies.front());
        thread.copies.erase(thread.copies.begin());
    }
}

void Block::land(Thread&, std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        std::memset(copy.shared, 0, static_cast<size_t>(copy.size));
        if (copy.bytes > 0) {
            std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
        }
        shared_.land(copy.shared, static_cast<size_t>(copy.size), thread_, epoch());
    }
}

}  // namespace pagewire::emulation
