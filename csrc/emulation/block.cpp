#include "emulation/block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace pagewire::emulation {

namespace {

std::mutex one_launch_at_a_time;

}  // namespace

std::string Where::name() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

Block& Block::running() {
    static Block block;
    return block;
}

void Block::run_grid(const char* kernel, int architecture, Index3 grid, int num_threads, size_t shared_bytes,
                     const std::function<void()>& body) {
    std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    if (num_threads % kWarp) {
        throw Fault(std::string(kernel) + ": the emulation runs whole warps, not " + std::to_string(num_threads) +
                    " threads");
    }
    launched_ = {kernel, grid, num_threads, shared_bytes, 0, 0};
    kernel_ = kernel;
    architecture_ = architecture;
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
    order_.reset(num_threads_);
    mbarriers_.reset();
    loads_.clear();
    num_at_block_ = 0;
    fault_.clear();
    shared_.reset(shared_bytes_, num_threads_);
    for (size_t t = 0; t < n; ++t) {
        threads_[t].state = kReady;
        fibers_[t]->start(&Block::enter, this);
    }
    do {
        run_ready_threads();
    } while (land_a_load());
    for (const Thread& t : threads_) {
        if (t.state != kDone) throw Fault(kernel_ + ": " + stuck());
    }
    if (const std::string left = unfinished(); !left.empty()) throw Fault(kernel_ + ": " + place() + " " + left);
}

void Block::run_ready_threads() {
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
}

void Block::enter(void* self) {
    Block& block = *static_cast<Block*>(self);
    (*block.body_)();
    block.threads_[static_cast<size_t>(block.thread_)].state = kDone;
}

std::string Block::place() const {
    return "block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " + std::to_string(block_.z) +
           ")";
}

// Of the threads that wait for the same, one tells the story.
std::string Block::stuck() const {
    const bool deadlock = std::any_of(threads_.begin(), threads_.end(), [](auto& t) { return t.state == kAtMbarrier; });
    std::string text = deadlock ? "deadlock: " : "divergent barrier: ";
    for (State state : {kAtMbarrier, kAtBlock, kAtWarp, kDone}) {
        std::set<int> told;
        for (size_t t = 0; t < threads_.size(); ++t) {
            const Thread& thread = threads_[t];
            if (thread.state != state || !told.insert(state == kAtMbarrier ? thread.mbarrier : 0).second) continue;
            text += "thread " + std::to_string(t);
            if (state == kDone) {
                text += " has returned; ";
                continue;
            }
            text += state == kAtMbarrier ? " waits for " + mbarriers_[thread.mbarrier].waits_for()
                                         : std::string(" waits in ") + thread.waits_at;
            text += " at " + thread.where.name() + "; ";
        }
    }
    return text + place();
}

void Block::report(const std::string& fault, Where where) {
    if (fault.empty()) return;
    fault_ = kernel_ + ": " + place() + " thread " + std::to_string(thread_) + " " + fault + " (" + where.name() + ")";
    fibers_[static_cast<size_t>(thread_)]->yield();  // and is never resumed
}

void Block::suspend(const char* name, Where where, State state) {
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
                   warp.where.name(),
               where);
    }
    warp.arguments[thread_ % kWarp] = arguments;
    ++warp.num_arrived;
}

void Block::sync_block(Where where) {
    if (num_at_block_ == 0) {
        block_where_ = where;
    } else if (block_where_.line != where.line) {
        report("divergent barrier: reaches sync_block while others wait at " + block_where_.name(), where);
    }
    if (++num_at_block_ < num_threads_) {
        suspend("sync_block", where, kAtBlock);
        return;
    }
    num_at_block_ = 0;
    order_.sync_block();
    release(0, num_threads_, kAtBlock);
}

void Block::copy_async(void* shared, const void* global, int size, int bytes, Where where) {
    check_alignment(shared, static_cast<size_t>(size), where);
    if (bytes > 0) check_alignment(global, static_cast<size_t>(size), where);
    report(shared_.begin_copy(shared, static_cast<size_t>(size), thread_), where);
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
        shared_.land(copy.shared, static_cast<size_t>(copy.size), thread_);
    }
}

}  // namespace pagewire::emulation
