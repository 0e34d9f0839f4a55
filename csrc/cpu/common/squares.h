// Sums of squares.
#pragma once

#include <cstdint>

namespace fishleg::cpu {

/// Σ x², in float32 sums of every sixteenth number.
inline double sum_of_squares(const float* x, int64_t count) {
    constexpr int64_t lanes = 16;
    float sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
        for (int64_t l = 0; l < lanes; ++l) sums[l] += x[i + l] * x[i + l];
    for (; i < count; ++i) sums[0] += x[i] * x[i];
    double total = 0;
    for (float sum : sums) total += sum;
    return total;
}

}  // namespace fishleg::cpu
