// Scratch memory that is kept from one call to the next: the operating system hands out fresh memory in pages, each at
// the price of a fault.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fishleg::cpu {

class Workspace {
  public:
    /// At least so many bytes, of whatever was in them, at the start of a page; valid until the next call.
    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            memory_.reset();
            const int64_t wanted = (bytes + page - 1) / page * page;
            size_ = 0;
            memory_.reset(static_cast<char*>(::operator new(wanted, std::align_val_t{page})));
            size_ = wanted;
#ifdef __linux__
            madvise(memory_.get(), size_, MADV_HUGEPAGE);  // a wish
#endif
        }
        return memory_.get();
    }

    /// Frees it where it is more than `bytes`.
    void keep_at_most(int64_t bytes) {
        if (size_ > bytes) memory_.reset(), size_ = 0;
    }

  private:
    static constexpr int64_t page = 1 << 21;
    struct Free {
        void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{page}); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t size_ = 0;
};

}  // namespace fishleg::cpu
