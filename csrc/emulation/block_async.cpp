// Block's mbarriers and the TMA loads that complete their phases.
#include "emulation/block.h"

namespace pagewire::emulation {

void Block::require_architecture(int least, const char* instruction, Where where) {
    if (architecture_ < least) {
        report("executes " + std::string(instruction) + " on sm_" + std::to_string(architecture_) +
                   ", which needs sm_" + std::to_string(least),
               where);
    }
}

// An mbarrier that this thread may use; what follows a fault is never run.
int Block::mbarrier_of(void* p, const char* doing, Where where) {
    const size_t offset = shared_.offset(p);
    const int found = mbarriers_.find(offset);
    if (found < 0) {
        report(std::string(doing) + " an mbarrier that was not initialised, byte " + std::to_string(offset), where);
    }
    const MbarrierState& m = mbarriers_[found];
    if (m.made_by != thread_ && !order_.before(m.made_by, m.made_at, thread_)) {
        report(std::string(doing) + " " + m.name() + " with no barrier since thread " + std::to_string(m.made_by) +
                   " initialised it",
               where);
    }
    return found;
}

void Block::init_mbarrier(void* mbarrier, int64_t count, Where where) {
    require_architecture(80, "mbarrier.init", where);
    check_alignment(mbarrier, 8, where);
    report(mbarriers_.init(shared_.offset(mbarrier), count, thread_, order_.now()), where);
    report(shared_.make_mbarrier(mbarrier, thread_), where);
}

void Block::arrive(void* mbarrier, Where where) {
    require_architecture(80, "mbarrier.arrive", where);
    const int at = mbarrier_of(mbarrier, "arrives at", where);
    report(mbarriers_.arrive(at, thread_, order_), where);
    complete(at);
}

void Block::expect_bytes(void* mbarrier, int64_t bytes, Where where) {
    require_architecture(90, "mbarrier.expect_tx", where);
    const int at = mbarrier_of(mbarrier, "expects bytes at", where);
    report(mbarriers_.add_bytes(at, bytes), where);
    complete(at);
}

void Block::wait(void* mbarrier, int parity, Where where) {
    require_architecture(90, "mbarrier.try_wait", where);
    const int at = mbarrier_of(mbarrier, "waits for", where);
    // asked again when it runs again: a phase that was completed meanwhile, and the next one too, is missed on a device
    while (!mbarriers_[at].is_over(parity)) {
        threads_[static_cast<size_t>(thread_)].mbarrier = at;
        suspend("mbarrier", where, kAtMbarrier);
    }
    order_.acquire(thread_, mbarriers_[at].completed);
}

void Block::complete(int mbarrier) {
    if (!mbarriers_.complete(mbarrier, num_threads_ + mbarrier, order_)) return;
    for (Thread& t : threads_) {
        if (t.state == kAtMbarrier && t.mbarrier == mbarrier) t.state = kReady;
    }
}

void Block::load_box(void* shared, const TensorMap* map, const std::array<int, 4>& corner, void* mbarrier,
                     Where where) {
    require_architecture(90, "cp.async.bulk.tensor", where);
    check_alignment(map, 64, where);
    if (!map->is_encoded()) report("loads by a tensor map that was not encoded", where);
    check_alignment(shared, 128, where);
    const int at = mbarrier_of(mbarrier, "loads for", where);
    const MbarrierState& m = mbarriers_[at];
    if (m.published_at == 0 || !(m.made_by == thread_ || order_.before(m.made_by, m.published_at, thread_))) {
        report(
            "loads for " + m.name() + " with no fence_mbarrier_init by thread " + std::to_string(m.made_by) + " before",
            where);
    }
    report(shared_.begin_load(shared, map->box_bytes(), thread_), where);
    loads_.push_back({*map, corner, static_cast<char*>(shared), at, where});
}

bool Block::land_a_load() {
    for (size_t i = 0; i < loads_.size(); ++i) {
        const size_t next = reverse_ ? loads_.size() - 1 - i : i;
        const Load load = loads_[next];
        bool wanted = false;
        for (const Thread& t : threads_) wanted |= t.state == kAtMbarrier && t.mbarrier == load.mbarrier;
        if (!wanted) continue;
        loads_.erase(loads_.begin() + static_cast<std::ptrdiff_t>(next));
        land_box(load.map, load.corner, shared_.data(), shared_.offset(load.shared));
        shared_.land_load(load.shared, load.map.box_bytes(), load.mbarrier);
        const std::string fault = mbarriers_.add_bytes(load.mbarrier, -static_cast<int64_t>(load.map.box_bytes()));
        if (!fault.empty()) throw Fault(kernel_ + ": " + place() + " a load of " + load.where.name() + " " + fault);
        complete(load.mbarrier);
        return true;
    }
    return false;
}

// What a block may not leave behind: its shared memory is the next one's.
std::string Block::unfinished() const {
    if (!loads_.empty()) {
        return "ends with " + std::to_string(loads_.size()) + " TMA loads under way that nobody waited for, one of " +
               loads_.front().where.name();
    }
    for (const MbarrierState& m : mbarriers_.all()) {
        if (m.bytes) return "ends while bytes are expected that never came: " + m.waits_for();
    }
    return {};
}

}  // namespace pagewire::emulation
