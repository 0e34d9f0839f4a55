// Moving averages of second moments, by packed products (gemm/products.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"

namespace fishleg::cpu {

/// out (size, size) becomes beta out + alpha xᵀx.
struct Moment {
    const float* x = nullptr;  // (positions, size)
    int64_t positions = 0;
    int64_t size = 0;
    int64_t stride = 0;  // of its rows, which have no gaps
    float* out = nullptr;
    int64_t out_stride = 0;
    float alpha = 1;
    float beta = 0;
};

/// Of the rows and of the columns of a block; several each where a factor is block-diagonal.
using Moments = std::vector<Moment>;

/// Average all of them, on several threads. Returns of each block whether what is added is finite; if not, nothing is
/// written to it.
std::vector<char> average(const Engine& engine, const std::vector<Moments>& blocks, int threads);

}  // namespace fishleg::cpu
