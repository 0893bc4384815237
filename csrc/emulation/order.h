// What happened before what in a block. Time is a count of the block's synchronisations; an access carries the time it
// was made at, and is ordered before everything that follows a later synchronisation its maker took part in.
//
// Barriers of the block and of a warp order all their threads, so one time each says everything. An mbarrier orders
// some threads with some others: whoever arrives leaves a clock of what it knows, whoever waits takes it along. A clock
// has a time for each warp and each thread; a thread has one only once it has waited or fenced, so that kernels without
// mbarriers pay for none.
//
// An mbarrier's completed copies count as made by one more "thread", num_threads + its index.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace pagewire::emulation {

using Time = uint32_t;

// Accesses that are known to be over: made before these times.
class Clock {
  public:
    void join(const Clock& other) {
        block = std::max(block, other.block);
        join(warps_, other.warps_);
        join(threads_, other.threads_);
    }
    void add_warp(int warp, Time time) { raise(warps_, warp, time); }
    void add_thread(int thread, Time time) { raise(threads_, thread, time); }
    void clear() { *this = Clock(); }

    bool covers_warp(int warp, Time then) const { return then < block || then < at(warps_, warp); }
    bool covers_thread(int thread, Time then) const { return then < block || then < at(threads_, thread); }

    Time block = 0;

  private:
    static void join(std::vector<Time>& mine, const std::vector<Time>& other) {
        if (mine.size() < other.size()) mine.resize(other.size());
        for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
    }
    static void raise(std::vector<Time>& times, int i, Time time) {
        if (times.size() <= static_cast<size_t>(i)) times.resize(static_cast<size_t>(i) + 1);
        times[static_cast<size_t>(i)] = std::max(times[static_cast<size_t>(i)], time);
    }
    static Time at(const std::vector<Time>& times, int i) {
        return static_cast<size_t>(i) < times.size() ? times[static_cast<size_t>(i)] : 0;
    }

    std::vector<Time> warps_, threads_;
};

class Order {
  public:
    static constexpr int kWarp = 32;

    void reset(int num_threads) {
        now_ = block_ = 0;
        asynchronous_ = false;
        warps_.assign(static_cast<size_t>(num_threads / kWarp), 0);
        known_.assign(static_cast<size_t>(num_threads), nullptr);
        fenced_.assign(static_cast<size_t>(num_threads), nullptr);
    }

    Time now() const { return now_; }
    bool since_block_barrier(Time then) const { return then >= block_; }
    bool since_warp_barrier(int warp, Time then) const { return then >= warps_[static_cast<size_t>(warp)]; }

    // Is what `who` did at `then` over for `thread`?
    bool before(int who, Time then, int thread) const {
        if (then < block_ || (who / kWarp == thread / kWarp && then < warp_barrier(thread))) return true;
        const Clock* known = known_[static_cast<size_t>(thread)].get();
        return known && covers(*known, who, then);
    }
    // Is what all of `warp` did together at `then` over for `thread`?
    bool warp_before(int warp, Time then, int thread) const {
        if (then < block_ || (warp == thread / kWarp && then < warp_barrier(thread))) return true;
        const Clock* known = known_[static_cast<size_t>(thread)].get();
        return known && covers_all(*known, warp, then);
    }
    // The same, and with a proxy fence on the way from there to `thread`?
    bool fenced(int who, Time then, int thread) const {
        const Clock* fenced = fenced_[static_cast<size_t>(thread)].get();
        return fenced && covers(*fenced, who, then);
    }
    bool warp_fenced(int warp, Time then, int thread) const {
        const Clock* fenced = fenced_[static_cast<size_t>(thread)].get();
        return fenced && covers_all(*fenced, warp, then);
    }
    bool block_fenced(Time then, int thread) const {
        const Clock* fenced = fenced_[static_cast<size_t>(thread)].get();
        return fenced && then < fenced->block;
    }

    void sync_block() {
        block_ = ++now_;
        if (!asynchronous_) return;
        for (auto& known : known_) known = nullptr;  // block_ says it
        share(fenced_, 0, fenced_.size());
    }
    void sync_warp(int warp) {
        warps_[static_cast<size_t>(warp)] = ++now_;
        if (!asynchronous_) return;
        share(known_, static_cast<size_t>(warp * kWarp), kWarp);
        share(fenced_, static_cast<size_t>(warp * kWarp), kWarp);
    }

    struct Released {
        Clock known, fenced;
        void join(const Released& other) {
            known.join(other.known);
            fenced.join(other.fenced);
        }
    };
    // What `thread` did and knows, into `to`.
    void release(int thread, Released& to) {
        to.known.join(everything_before(thread));
        if (const Clock* fenced = fenced_[static_cast<size_t>(thread)].get()) to.fenced.join(*fenced);
    }
    void acquire(int thread, const Released& from) {
        asynchronous_ = true;
        join(known_[static_cast<size_t>(thread)], from.known);
        join(fenced_[static_cast<size_t>(thread)], from.fenced);
    }
    // A proxy fence: what is over for `thread` is over for the copies that it will issue, or whoever it is before.
    void fence(int thread) {
        asynchronous_ = true;
        join(fenced_[static_cast<size_t>(thread)], everything_before(thread));
    }
    Time tick() { return ++now_; }

  private:
    using Shared = std::shared_ptr<const Clock>;  // lanes mostly know the same

    Time warp_barrier(int thread) const { return warps_[static_cast<size_t>(thread / kWarp)]; }

    bool covers(const Clock& clock, int who, Time then) const {
        return clock.covers_thread(who, then) || clock.covers_warp(who / kWarp, then);
    }
    static bool covers_all(const Clock& clock, int warp, Time then) {
        if (clock.covers_warp(warp, then)) return true;
        for (int lane = 0; lane < kWarp; ++lane) {
            if (!clock.covers_thread(warp * kWarp + lane, then)) return false;
        }
        return true;
    }

    Clock everything_before(int thread) {
        Clock clock;
        if (const Clock* known = known_[static_cast<size_t>(thread)].get()) clock = *known;
        clock.block = block_;
        clock.add_warp(thread / kWarp, warp_barrier(thread));
        clock.add_thread(thread, tick());
        return clock;
    }

    static void join(Shared& mine, const Clock& other) {
        auto joined = std::make_shared<Clock>(other);
        if (mine) joined->join(*mine);
        mine = std::move(joined);
    }
    static void share(std::vector<Shared>& clocks, size_t first, size_t count) {
        const auto begin = clocks.begin() + static_cast<std::ptrdiff_t>(first);
        const auto end = begin + static_cast<std::ptrdiff_t>(count);
        if (std::all_of(begin, end, [&](const Shared& c) { return c == *begin; })) return;
        auto joined = std::make_shared<Clock>();
        for (auto clock = begin; clock != end; ++clock) {
            if (*clock) joined->join(**clock);
        }
        std::fill(begin, end, joined);
    }

    Time now_ = 0, block_ = 0;  // block_: the newest block barrier
    bool asynchronous_ = false;
    std::vector<Time> warps_;  // the newest barrier of each warp
    std::vector<Shared> known_, fenced_;
};

}  // namespace pagewire::emulation
