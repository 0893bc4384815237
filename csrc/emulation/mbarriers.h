// The mbarriers of one block: phases that complete when so many threads have arrived and so many bytes have come.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulation/order.h"

namespace pagewire::emulation {

struct MbarrierState {
    static constexpr int64_t kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes at a time

    size_t offset;  // in shared memory
    int64_t count, pending, bytes = 0;
    uint32_t phase = 0;
    int made_by;
    Time made_at, published_at = 0;  // to the asynchronous proxy; 0: not yet
    Order::Released arriving{}, completed{};

    // A wait for a parity returns once the phase of that parity is over: at once where it is not under way.
    bool is_over(int parity) const { return static_cast<int>(phase % 2) != parity; }
    std::string name() const { return "the mbarrier at byte " + std::to_string(offset); }
    std::string waits_for() const {
        return name() + ", phase " + std::to_string(phase) + ": " + std::to_string(pending) + " of " +
               std::to_string(count) + " arrivals and " + std::to_string(bytes) + " bytes to come";
    }
};

class Mbarriers {
  public:
    void reset() { all_.clear(); }
    MbarrierState& operator[](int i) { return all_[static_cast<size_t>(i)]; }
    const MbarrierState& operator[](int i) const { return all_[static_cast<size_t>(i)]; }
    const std::vector<MbarrierState>& all() const { return all_; }

    int find(size_t offset) const {
        for (size_t i = 0; i < all_.size(); ++i) {
            if (all_[i].offset == offset) return static_cast<int>(i);
        }
        return -1;
    }

    std::string init(size_t offset, int64_t count, int thread, Time now) {
        if (find(offset) >= 0) return "initialises " + all_[static_cast<size_t>(find(offset))].name() + " again";
        if (count < 1 || count > MbarrierState::kMaxCount) {
            return "initialises an mbarrier with " + std::to_string(count) + " arrivals";
        }
        all_.push_back({.offset = offset, .count = count, .pending = count, .made_by = thread, .made_at = now});
        return {};
    }
    // What `thread` made may be used by asynchronous copies of whoever is ordered after it.
    void publish(int thread, Time now) {
        for (MbarrierState& m : all_) {
            if (m.made_by == thread && m.published_at == 0) m.published_at = now;
        }
    }

    // A phase that completes is said to `order`.
    std::string arrive(int i, int thread, Order& order) {
        MbarrierState& m = (*this)[i];
        if (m.pending == 0) {
            return "arrives at " + m.name() + " after all " + std::to_string(m.count) + " that it expects";
        }
        order.release(thread, m.arriving);
        --m.pending;
        return {};
    }
    std::string add_bytes(int i, int64_t bytes) {
        MbarrierState& m = (*this)[i];
        m.bytes += bytes;
        if (m.bytes > MbarrierState::kMaxCount || m.bytes < -MbarrierState::kMaxCount) {
            return "lets " + m.name() + " wait for " + std::to_string(m.bytes) + " bytes, at most " +
                   std::to_string(MbarrierState::kMaxCount);
        }
        return {};
    }
    bool complete(int i, int as_thread, Order& order) {
        MbarrierState& m = (*this)[i];
        if (m.pending || m.bytes) return false;
        m.arriving.known.add_thread(as_thread, order.tick());
        m.completed.join(m.arriving);
        m.arriving = {};
        m.pending = m.count;
        ++m.phase;
        return true;
    }

  private:
    std::vector<MbarrierState> all_;
};

}  // namespace pagewire::emulation
