// The engine on AVX-512: float32 operands and sums.
//
// A panel is, for each of its depth, 32 lanes in a row, in left operands as in right ones.
#include "cpu/gemm/engine.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#include <immintrin.h>

#include <algorithm>

#include "cpu/gemm/transpose16.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t strip = 8;     // rows that are summed in registers together
constexpr int64_t chunk = 128;   // depth of which both panels stay in the first cache: 16 KB each
constexpr int64_t vector = 16;

void enter(void*) {}
void leave(const void*) {}

__mmask16 first(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

/// 16 lanes, depth along the memory.
void along_depth(const Lanes& from, int64_t lane, float* to) {
    for (int64_t k = 0; k < from.depth; k += 16, to += 16 * panel) {
        const int64_t deep = std::min<int64_t>(16, from.depth - k);
        __m512i rows[16];
        for (int64_t i = 0; i < 16; ++i) {
            const float* x = from.source + (lane + i) * from.lane_stride + k;
            rows[i] = lane + i < from.lanes ? _mm512_maskz_loadu_epi32(first(deep), x) : _mm512_setzero_si512();
        }
        transpose16(rows);
        for (int64_t d = 0; d < 16; ++d)
            if (d < deep) _mm512_storeu_si512(to + d * panel, rows[d]);
    }
}

void pack(Side, const Lanes& from, void* to) {
    auto* out = static_cast<float*>(to);
    for (int64_t lane = 0; lane < panel; lane += vector) {
        if (from.depth_stride == 1) {
            along_depth(from, lane, out + lane);
            continue;
        }
        const __mmask16 there = first(from.lanes - lane);
        const float* x = from.source + lane;
        for (int64_t k = 0; k < from.depth; ++k, x += from.depth_stride)
            _mm512_storeu_ps(out + k * panel + lane, there ? _mm512_maskz_loadu_ps(there, x) : _mm512_setzero_ps());
    }
}

/// A strip of c, `vectors` wide: as many sums as hide the latency of the multiplications, and far fewer loads than those.
/// `ahead`: ask for the next chunk of both panels, which in use may come from memory.
template <int vectors, bool ahead>
void sum(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add) {
    __m512 sums[strip][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < strip; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j)
            sums[i][j] = add ? _mm512_loadu_ps(c + i * stride + j * vector) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k, a += panel, b += panel) {
        if constexpr (ahead) {
            for (const float* next : {a + chunk * panel, b + chunk * panel})
                for (int64_t line : {0, 1})
                    _mm_prefetch(reinterpret_cast<const char*>(next + line * vector), _MM_HINT_T1);
        }
        __m512 right[vectors];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) right[j] = _mm512_loadu_ps(b + j * vector);
#pragma GCC unroll 8
        for (int i = 0; i < strip; ++i) {
            const __m512 left = _mm512_set1_ps(a[i]);
#pragma GCC unroll 2
            for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_fmadd_ps(left, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < strip; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) _mm512_storeu_ps(c + i * stride + j * vector, sums[i][j]);
}

void microkernel(const void* left, const void* right, int64_t depth, int64_t rows, int64_t columns, float* c,
                 int64_t stride, bool add) {
    const auto *a = static_cast<const float*>(left), *b = static_cast<const float*>(right);
    const auto first = columns <= vector ? sum<1, true> : sum<2, true>;
    const auto others = columns <= vector ? sum<1, false> : sum<2, false>;
    int64_t k = 0;
    do {  // at least once: a product of no depth is zero
        const int64_t deep = std::min(chunk, depth - k);
        for (int64_t i = 0; i < rows; i += strip)
            (i == 0 ? first : others)(a + k * panel + i, b + k * panel, deep, c + i * stride, stride, add || k > 0);
        k += chunk;
    } while (k < depth);
}

constexpr Engine engine = {"avx512", 4, 1, enter, leave, pack, microkernel};

}  // namespace

const Engine* avx512_engine() {
    static const bool usable = __builtin_cpu_supports("x86-64-v4");
    return usable ? &engine : nullptr;
}

}  // namespace fishleg::cpu

#else

namespace fishleg::cpu {

const Engine* avx512_engine() { return nullptr; }

}  // namespace fishleg::cpu

#endif
