// The shared memory of one block, with what is known about every word of it: is it written, is an
// asynchronous copy under way into it, who touched it last and when.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation/order.h"

namespace pagewire::emulation {

class SharedMemory {
  public:
    static constexpr int kWarp = 32;

    explicit SharedMemory(const Order& order) : order_(order) {}

    void reset(size_t bytes, int num_threads) {
        // exactly `bytes`, from the heap: AddressSanitizer sees an access past the end by an
        // ordinary pointer too
        bytes_ = bytes;
        num_threads_ = num_threads;
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, bytes ? bytes : 1)) throw std::bad_alloc();
        data_.reset(static_cast<char*>(memory));
        std::memset(data_.get(), 0xFF, bytes);  // NaN in every float format
        words_.assign((bytes + 3) / 4, Word{});
        readers_.clear();
        has_mbarriers_ = false;
    }

    char* data() { return data_.get(); }
    size_t offset(const void* address) const {
        return static_cast<size_t>(static_cast<const char*>(address) - data_.get());
    }

    // Each returns what is wrong, or an empty string.
    std::string read(const void* address, size_t bytes, int thread, bool by_whole_warp) {
        std::string fault = outside(address, bytes);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            Word& w = words_[i];
            if (w.use != kData) return "reads " + what(w) + at(i);
            if ((w.written & mask(address, bytes, i)) != mask(address, bytes, i)) {
                return "reads uninitialised shared memory" + at(i);
            }
            const bool own = w.writer == thread && !by_whole_warp;
            if (!own && !order_.before(w.writer, w.write_time, thread)) {
                return "reads what " + made_by(w.writer) + between(w.writer) + at(i);
            }
            note_reader(w,
                        {by_whole_warp ? kWholeWarp : static_cast<int16_t>(thread),
                         static_cast<int16_t>(thread / kWarp), order_.now()},
                        thread);
        }
        return fault;
    }

    std::string write(const void* address, size_t bytes, int thread) {
        std::string fault = overwrite(address, bytes, thread);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            set(words_[i], mask(address, bytes, i), thread);
        }
        return fault;
    }

    // A copy was issued: nobody may touch the bytes until land().
    std::string begin_copy(const void* address, size_t bytes, int thread) {
        return begin(address, bytes, thread, kCopying);
    }
    void land(const void* address, size_t bytes, int thread) {
        for (size_t i = first(address); i <= last(address, bytes); ++i) words_[i].use = kData;
        write(address, bytes, thread);
    }

    // By the asynchronous proxy, whose copies are not ordered after ordinary accesses without a fence.
    std::string begin_load(const void* address, size_t bytes, int thread) {
        std::string fault = overwrite(address, bytes, thread);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            fault = unfenced(words_[i], thread);
            if (!fault.empty()) fault += at(i);
        }
        if (!fault.empty()) return fault;
        for (size_t i = first(address); i <= last(address, bytes); ++i) words_[i].use = kLoading;
        return {};
    }
    void land_load(const void* address, size_t bytes, int mbarrier) {
        for (size_t i = first(address); i <= last(address, bytes); ++i) {
            words_[i].use = kData;
            set(words_[i], mask(address, bytes, i), num_threads_ + mbarrier);
        }
    }

    std::string make_mbarrier(const void* address, int thread) {
        has_mbarriers_ = true;
        return begin(address, 8, thread, kMbarrier);
    }

  private:
    static constexpr int16_t kNobody = -1, kWholeWarp = -2, kSeveralWarps = -3, kListed = -4;
    enum Use : uint8_t { kData, kCopying, kLoading, kMbarrier };

    struct Read {
        int16_t who = kNobody;
        int16_t warp = 0;
        Time time = 0;
    };
    struct Word {
        uint8_t written = 0;  // one bit per byte
        Use use = kData;
        int16_t writer = kNobody;  // num_threads_ + i: a load that mbarrier i completed
        Time write_time = 0;
        Read read;
    };

    struct Free {
        void operator()(char* p) const { std::free(p); }
    };

    size_t first(const void* address) const { return offset(address) / 4; }
    size_t last(const void* address, size_t bytes) const { return (offset(address) + bytes - 1) / 4; }

    uint8_t mask(const void* address, size_t bytes, size_t word) const {
        uint8_t bits = 0;
        for (size_t i = 0; i < 4; ++i) {
            const size_t byte = word * 4 + i;
            if (byte >= offset(address) && byte < offset(address) + bytes) bits |= 1u << i;
        }
        return bits;
    }

    static std::string at(size_t word) { return ", byte " + std::to_string(word * 4); }
    static std::string what(const Word& w) {
        switch (w.use) {
            case kCopying:
                return "bytes of a cp.async that has not been waited for";
            case kLoading:
                return "bytes of a TMA load that is still under way";
            default:
                return "an mbarrier like data";
        }
    }
    std::string made_by(int writer) const {
        return writer < num_threads_ ? "thread " + std::to_string(writer) + " wrote" : "a TMA load wrote";
    }
    std::string between(int writer) const {
        return writer < num_threads_ ? " with no barrier between" : " without having waited for its mbarrier";
    }

    std::string outside(const void* address, size_t bytes) const {
        const size_t o = offset(address);
        if (o < bytes_ && bytes <= bytes_ - o) return {};
        return "touches bytes outside the block's " + std::to_string(bytes_) + " bytes of shared memory, byte " +
               std::to_string(static_cast<int64_t>(o));
    }

    std::string begin(const void* address, size_t bytes, int thread, Use use) {
        std::string fault = overwrite(address, bytes, thread);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) words_[i].use = use;
        return fault;
    }

    void set(Word& w, uint8_t bytes, int writer) {
        w.written |= bytes;
        w.writer = static_cast<int16_t>(writer);
        w.write_time = order_.now();
        w.read.who = kNobody;
    }

    std::string overwrite(const void* address, size_t bytes, int thread) {
        std::string fault = outside(address, bytes);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            const Word& w = words_[i];
            if (w.use == kCopying) return "writes bytes into which a cp.async is under way" + at(i);
            if (w.use == kLoading) return "writes bytes into which a TMA load is under way" + at(i);
            if (w.use == kMbarrier) return "overwrites an mbarrier" + at(i);
            if (w.written && w.writer != thread && !order_.before(w.writer, w.write_time, thread)) {
                return "overwrites what " + made_by(w.writer) + between(w.writer) + at(i);
            }
            const bool all_read = w.read.who != kListed ? over(w.read, thread) : [&] {
                const auto& reads = readers_.at(&w);
                return std::all_of(reads.begin(), reads.end(), [&](const Read& r) { return over(r, thread); });
            }();
            if (!all_read) return "overwrites what another thread may still be reading, no barrier between" + at(i);
        }
        return fault;
    }

    // Is this read over for `thread`?
    bool over(const Read& r, int thread) const {
        if (r.who == kNobody || r.who == thread) return true;
        if (r.who == kSeveralWarps) return !order_.since_block_barrier(r.time);
        if (r.who == kWholeWarp) return order_.warp_before(r.warp, r.time, thread);
        return order_.before(r.who, r.time, thread);
    }

    // An ordinary write, or read, with no proxy fence between it and the copy that `thread` issues.
    std::string unfenced(const Word& w, int thread) const {
        if (w.written && w.writer < num_threads_ && !order_.fenced(w.writer, w.write_time, thread)) {
            return "lets a TMA load overwrite what thread " + std::to_string(w.writer) +
                   " wrote with no fence_proxy_async between";
        }
        const auto fenced = [&](const Read& r) {
            if (r.who == kNobody) return true;
            if (r.who == kSeveralWarps) return order_.block_fenced(r.time, thread);
            if (r.who == kWholeWarp) return order_.warp_fenced(r.warp, r.time, thread);
            return order_.fenced(r.who, r.time, thread);
        };
        bool all = true;
        if (w.read.who != kListed) {
            all = fenced(w.read);
        } else {
            for (const Read& r : readers_.at(&w)) all = all && fenced(r);
        }
        return all ? "" : "lets a TMA load overwrite what was read with no fence_proxy_async between";
    }

    // Of several reads, the last of each thread counts. Without mbarriers whole warps and blocks are ordered, and one
    // entry can stand for them.
    void note_reader(Word& w, Read now, int thread) {
        Read& r = w.read;
        if (has_mbarriers_) {
            if (r.who == kListed) {
                auto& reads = readers_[&w];
                std::erase_if(reads, [&](const Read& then) { return replaces(now, then, thread); });
                reads.push_back(now);
            } else if (replaces(now, r, thread)) {
                r = now;
            } else {
                readers_[&w] = {r, now};
                r.who = kListed;
            }
            return;
        }
        const bool same_time = r.who != kNobody && order_.since_block_barrier(r.time);
        if (same_time && (r.who == kSeveralWarps || r.warp != now.warp)) {
            now.who = kSeveralWarps;
        } else if (same_time && order_.since_warp_barrier(now.warp, r.time) && r.who != now.who) {
            now.who = kWholeWarp;
        }
        r = now;
    }
    bool replaces(const Read& now, const Read& then, int thread) const {
        return over(then, thread) || (then.who == now.who && then.warp == now.warp);
    }

    const Order& order_;
    size_t bytes_ = 0;
    int num_threads_ = 0;
    bool has_mbarriers_ = false;
    std::unique_ptr<char, Free> data_;
    std::vector<Word> words_;
    std::unordered_map<const Word*, std::vector<Read>> readers_;  // of words with several unordered ones
};

}  // namespace pagewire::emulation
