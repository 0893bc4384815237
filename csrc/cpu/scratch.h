// Scratch memory that a calling thread keeps between calls, 64-byte aligned.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pagewire::cpu {

class Scratch {
  public:
    ~Scratch() { std::free(data_); }

    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 63) / 64 * 64;
            data_ = static_cast<char*>(std::aligned_alloc(64, size_));
            if (data_ == nullptr) {
                size_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace pagewire::cpu
