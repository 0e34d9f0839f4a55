#include "cpu/common/denormals.h"

#include "cpu/common/threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define FISHLEG_HAS_MXCSR 1
#endif

namespace fishleg::cpu {
namespace {

#ifdef FISHLEG_HAS_MXCSR
constexpr uint32_t flush_bits = 0x8040;  // results to zero, operands as zero

uint32_t exchange(uint32_t bits) {
    const uint32_t before = _mm_getcsr();
    _mm_setcsr((before & ~flush_bits) | (bits & flush_bits));
    return before & flush_bits;
}
#else
constexpr uint32_t flush_bits = 0;
uint32_t exchange(uint32_t) { return 0; }
#endif

}  // namespace

bool can_flush_denormals() { return flush_bits != 0; }

std::vector<uint32_t> flush_denormals(int threads) {
    std::vector<uint32_t> before(threads < 1 ? 1 : threads);
    // One iteration a thread, always the same one: OpenMP keeps its threads, in their order, from region to region.
    parallel_for(static_cast<int64_t>(before.size()), threads, [&](int64_t i) { before[i] = exchange(flush_bits); });
    return before;
}

void restore_denormals(const std::vector<uint32_t>& settings) {
    parallel_for(static_cast<int64_t>(settings.size()), static_cast<int>(settings.size()),
                 [&](int64_t i) { exchange(settings[i]); });
}

}  // namespace fishleg::cpu
