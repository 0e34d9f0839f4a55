// Runs CUDA kernels on the CPU, for tests: a thread block's threads are fibers, one after the other.
//
// It shows index arithmetic, sums, barriers that all threads reach, and (under AddressSanitizer) accesses out of bounds.
// It does not show races, since a fiber only gives way at a barrier, nor what hardware does otherwise.
// Shared memory is filled with NaN before each thread block, and of exactly the size that the launch asked for.
#pragma once

#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
#include <csetjmp>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};

namespace fishleg::emulation {

using Words = std::array<uint32_t, 6>;
constexpr size_t stack_bytes = 128 * 1024;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#else
    jmp_buf resume;
#endif
    bool started = false, done = false;
};

struct Barrier {
    int waiting = 0;
    unsigned generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<std::array<Words, 32>> posted[2];  // by parity: a lane is at most one exchange ahead of its warp
    std::vector<unsigned> exchanges;               // of each thread
    Barrier all;
    std::unique_ptr<unsigned char[]> shared;
    const std::function<void()>* body = nullptr;
    int current = 0, count = 0;
    unsigned index = 0;
    ucontext_t scheduler;
#if defined(__SANITIZE_ADDRESS__)
    void* scheduler_fake = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
#else
    jmp_buf back;
#endif
};

inline Block& block() {
    static Block one;
    return one;
}

inline void enter() {
    Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_size);
#endif
    (*b.body)();
    Fiber& me = b.fibers[b.current];
    me.done = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, b.scheduler_stack, b.scheduler_size);
    swapcontext(&me.context, &b.scheduler);
#else
    _longjmp(b.back, 1);
#endif
}

/// To the scheduler, and back when it is this fiber's turn again.
inline void give_way() {
    Block& b = block();
    Fiber& me = b.fibers[b.current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&me.fake_stack, b.scheduler_stack, b.scheduler_size);
    swapcontext(&me.context, &b.scheduler);
    __sanitizer_finish_switch_fiber(me.fake_stack, &b.scheduler_stack, &b.scheduler_size);
#else
    if (_setjmp(me.resume) == 0) {
        _longjmp(b.back, 1);
    }
#endif
}

/// Runs fiber ``i`` until it gives way or ends.
[[gnu::noinline]] inline void resume(int i) {
    Block& b = block();
    Fiber& f = b.fibers[i];
    b.current = i;
#if defined(__SANITIZE_ADDRESS__)
    f.started = true;
    __sanitizer_start_switch_fiber(&b.scheduler_fake, f.stack.get(), stack_bytes);
    swapcontext(&b.scheduler, &f.context);
    __sanitizer_finish_switch_fiber(b.scheduler_fake, nullptr, nullptr);
#else
    if (_setjmp(b.back) == 0) {
        if (f.started) {
            _longjmp(f.resume, 1);
        }
        f.started = true;
        setcontext(&f.context);
    }
#endif
}

inline void arrive(Barrier& barrier, int members) {
    if (++barrier.waiting == members) {
        barrier.waiting = 0;
        ++barrier.generation;
        return;
    }
    for (const unsigned mine = barrier.generation; barrier.generation == mine;) {
        give_way();
    }
}

inline int lane() { return block().current % 32; }

/// Every lane of the warp posts its words; all see what all have posted.
inline const Words* exchange(const Words& mine) {
    Block& b = block();
    const int warp = b.current / 32;
    auto& posted = b.posted[b.exchanges[b.current]++ % 2][warp];
    posted[lane()] = mine;
    arrive(b.warps[warp], 32);
    return posted.data();
}

[[gnu::noinline]] inline void start(Fiber& f) {
    if (!f.stack) {
        f.stack.reset(new char[stack_bytes]);
    }
    f.started = f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
}

/// How many launches there were.
inline int64_t& launches() {
    static int64_t count = 0;
    return count;
}

/// When the latest was, in seconds of the monotonic clock.
inline double& last_launch() {
    static double when = 0;
    return when;
}

/// A launch that is only counted, but whose table has to be there.
inline void count_launch(const void* table) {
    asm volatile("" : : "r"(table) : "memory");
    ++launches();
    last_launch() = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Runs ``body`` for every thread of every block of the grid.
inline void run(const std::function<void()>& body, int64_t grid, int threads, size_t shared) {
    Block& b = block();
    if (threads % 32 != 0 || shared > 99 * 1024) {
        std::fprintf(stderr, "a launch of %d threads with %zu bytes of shared memory\n", threads, shared);
        std::abort();
    }
    ++launches();
    b.body = &body;
    b.count = threads;
    if (static_cast<int>(b.fibers.size()) < threads) {
        b.fibers.resize(threads);
    }
    for (int64_t index = 0; index < grid; ++index) {
        b.index = static_cast<unsigned>(index);
        b.shared.reset(static_cast<unsigned char*>(std::memset(new unsigned char[shared], 0xff, shared)));
        b.all = {};
        b.warps.assign(threads / 32, {});
        b.posted[0].assign(threads / 32, {});
        b.posted[1].assign(threads / 32, {});
        b.exchanges.assign(threads, 0);
        for (int i = 0; i < threads; ++i) {
            start(b.fibers[i]);
        }
        for (int left = threads; left > 0;) {
            for (int i = 0; i < threads; ++i) {
                if (!b.fibers[i].done) {
                    resume(i);
                    left -= b.fibers[i].done;
                }
            }
            if (left > 0 && left < threads && b.all.waiting == left) {
                std::fprintf(stderr, "a barrier that %d of %d threads never reach\n", threads - left, threads);
                std::abort();
            }
        }
    }
}

}  // namespace fishleg::emulation

#define threadIdx (Index{static_cast<unsigned>(fishleg::emulation::block().current)})
#define blockIdx (Index{fishleg::emulation::block().index})
#define blockDim (Index{static_cast<unsigned>(fishleg::emulation::block().count)})

#define FISHLEG_SHARED(T, name) T* const name = reinterpret_cast<T*>(fishleg::emulation::block().shared.get())

inline void __syncthreads() {
    auto& b = fishleg::emulation::block();
    fishleg::emulation::arrive(b.all, b.count);
}

inline double __shfl_down_sync(unsigned, double x, int offset) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const auto* all = fishleg::emulation::exchange({static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)});
    const int lane = fishleg::emulation::lane(), from = lane + offset < 32 ? lane + offset : lane;
    bits = all[from][0] | static_cast<uint64_t>(all[from][1]) << 32;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline void __threadfence() {}

inline int32_t atomicAdd(int32_t* to, int32_t more) {
    const int32_t before = *to;
    *to += more;
    return before;
}
