// What is done with tiles, 32 × 32 numbers of a matrix, beside multiplying them (gemm/engine.h).
#pragma once

#include <cstdint>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace fishleg::cpu {

/// Has a tile brought into the cache: its rows are in 32 pages, which no processor foresees.
inline void prefetch_tile(const float* first, int64_t stride) {
#ifdef __GNUC__
    for (int64_t r = 0; r < 32; ++r)
        for (int64_t s : {0, 16, 31}) __builtin_prefetch(first + r * stride + s);
#endif
    (void)first, (void)stride;
}

/// to = fromᵀ
inline void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#ifdef __SSE__
    for (int64_t k = 0; k < 32; k += 4) {
        for (int64_t r = 0; r < 32; r += 4) {
            const float* x = from + r * from_stride + k;
            float* y = to + k * to_stride + r;
            __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(x + from_stride), c = _mm_loadu_ps(x + 2 * from_stride),
                   d = _mm_loadu_ps(x + 3 * from_stride);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(y, a);
            _mm_storeu_ps(y + to_stride, b);
            _mm_storeu_ps(y + 2 * to_stride, c);
            _mm_storeu_ps(y + 3 * to_stride, d);
        }
    }
#else
    for (int64_t k = 0; k < 32; ++k)
        for (int64_t r = 0; r < 32; ++r) to[k * to_stride + r] = from[r * from_stride + k];
#endif
}

}  // namespace fishleg::cpu
