// The shared memory of one block, with what is known about every word of it: is it written, is an
// asynchronous copy under way into it, who touched it last and before which barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace pagewire::emulation {

// Barriers seen by a thread: of its block and of its warp (a block barrier counts as both).
struct Epoch {
    uint32_t block = 0, warp = 0;
};

class SharedMemory {
  public:
    static constexpr int kWarp = 32;

    void reset(size_t bytes) {
        // exactly `bytes`, from the heap: AddressSanitizer sees an access past the end by an
        // ordinary pointer too
        bytes_ = bytes;
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, bytes ? bytes : 1)) throw std::bad_alloc();
        data_.reset(static_cast<char*>(memory));
        std::memset(data_.get(), 0xFF, bytes);  // NaN in every float format
        words_.assign((bytes + 3) / 4, Word{});
    }

    char* data() { return data_.get(); }

    // Each returns what is wrong, or an empty string.
    std::string read(const void* address, size_t bytes, int thread, Epoch now, bool by_whole_warp) {
        std::string fault = outside(address, bytes);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            Word& w = words_[i];
            if (w.pending) return "reads bytes of a cp.async that has not been waited for" + at(i);
            if ((w.written & mask(address, bytes, i)) != mask(address, bytes, i)) {
                return "reads uninitialised shared memory" + at(i);
            }
            const bool own = w.writer == thread && !by_whole_warp;
            if (!own && !before(w.writer, w.write_epoch, thread, now)) {
                return "reads what thread " + std::to_string(w.writer) + " wrote with no barrier between" + at(i);
            }
            note_reader(w, by_whole_warp ? kWholeWarp : static_cast<int16_t>(thread), thread, now);
        }
        return fault;
    }

    std::string write(const void* address, size_t bytes, int thread, Epoch now) {
        std::string fault = overwrite(address, bytes, thread, now);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            Word& w = words_[i];
            w.written |= mask(address, bytes, i);
            w.writer = static_cast<int16_t>(thread);
            w.write_epoch = now;
            w.reader = kNobody;
        }
        return fault;
    }

    // A copy was issued: nobody may touch the bytes until land().
    std::string begin_copy(const void* address, size_t bytes, int thread, Epoch now) {
        std::string fault = overwrite(address, bytes, thread, now);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            words_[i].pending = true;
        }
        return fault;
    }

    void land(const void* address, size_t bytes, int thread, Epoch now) {
        for (size_t i = first(address); i <= last(address, bytes); ++i) words_[i].pending = false;
        write(address, bytes, thread, now);
    }

  private:
    static constexpr int16_t kNobody = -1, kWholeWarp = -2, kSeveralWarps = -3;

    struct Word {
        uint8_t written = 0;  // one bit per byte
        bool pending = false;
        int16_t writer = kNobody;
        int16_t reader = kNobody;
        int16_t reader_warp = 0;
        Epoch write_epoch, read_epoch;
    };

    struct Free {
        void operator()(char* p) const { std::free(p); }
    };

    size_t offset(const void* address) const {
        return static_cast<size_t>(static_cast<const char*>(address) - data_.get());
    }
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

    std::string outside(const void* address, size_t bytes) const {
        const size_t o = offset(address);
        if (o < bytes_ && bytes <= bytes_ - o) return {};
        return "touches bytes outside the block's " + std::to_string(bytes_) + " bytes of shared memory, byte " +
               std::to_string(static_cast<int64_t>(o));
    }

    std::string overwrite(const void* address, size_t bytes, int thread, Epoch now) {
        std::string fault = outside(address, bytes);
        for (size_t i = first(address); fault.empty() && i <= last(address, bytes); ++i) {
            const Word& w = words_[i];
            if (w.pending) return "writes bytes into which a cp.async is under way" + at(i);
            if (w.written && w.writer != thread && !before(w.writer, w.write_epoch, thread, now)) {
                return "overwrites what thread " + std::to_string(w.writer) + " wrote with no barrier between" + at(i);
            }
            if (w.reader == kNobody || w.reader == thread) continue;
            const bool same_warp = w.reader != kSeveralWarps && w.reader_warp == thread / kWarp;
            const bool ordered = w.read_epoch.block < now.block || (same_warp && w.read_epoch.warp < now.warp);
            if (!ordered) {
                return "overwrites what another thread may still be reading, no barrier between" + at(i);
            }
        }
        return fault;
    }

    static bool before(int writer, Epoch then, int thread, Epoch now) {
        return then.block < now.block || (writer / kWarp == thread / kWarp && then.warp < now.warp);
    }

    static void note_reader(Word& w, int16_t reader, int thread, Epoch now) {
        const int16_t warp = static_cast<int16_t>(thread / kWarp);
        const bool same_time = w.reader != kNobody && w.read_epoch.block == now.block;
        if (same_time && (w.reader == kSeveralWarps || w.reader_warp != warp)) {
            w.reader = kSeveralWarps;
        } else if (same_time && w.read_epoch.warp == now.warp && w.reader != reader) {
            w.reader = kWholeWarp;
        } else {
            w.reader = reader;
        }
        w.reader_warp = warp;
        w.read_epoch = now;
    }

    size_t bytes_ = 0;
    std::unique_ptr<char, Free> data_;
    std::vector<Word> words_;
};

}  // namespace pagewire::emulation
