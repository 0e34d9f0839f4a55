// What the products share: tiles from memory to shared memory, a warp's 32×32 product, and what is done with it.
#pragma once

#include "cuda/device/ptx.h"
#include "cuda/tables.h"

namespace fishleg::cuda {

/// A warp's 32×32 product: two by four fragments (see ptx.h).
struct Accumulator {
    float c[2][4][4];
};

__device__ __forceinline__ void clear(Accumulator& acc) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                acc.c[i][j][r] = 0;
            }
        }
    }
}

/// Starts the copy of a (rows, columns) tile into shared memory; what is beyond the matrix becomes zero.
template <int threads>
__device__ __forceinline__ void copy_tile(float* to, int to_ld, const float* from, int64_t ld, int rows, int columns,
                                          int row, int column, int row_end, int column_end, bool aligned) {
    const int t = static_cast<int>(threadIdx.x);
    if (aligned) {
        const int chunks = columns / 4;
        for (int i = t; i < rows * chunks; i += threads) {
            const int r = i / chunks, c = 4 * (i % chunks);
            int left = row + r < row_end ? column_end - column - c : 0;
            left = left < 0 ? 0 : left > 4 ? 4 : left;
            copy_16(to + r * to_ld + c, left ? from + (row + r) * ld + column + c : from, 4 * left);
        }
    } else {
        for (int i = t; i < rows * columns; i += threads) {
            const int r = i / columns, c = i % columns;
            const bool in = row + r < row_end && column + c < column_end;
            copy_4(to + r * to_ld + c, in ? from + (row + r) * ld + column + c : from, in ? 4 : 0);
        }
    }
}

/// x as tf32 and, where ``split``, what that leaves of it.
template <bool split>
__device__ __forceinline__ void to_tf32(float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    if constexpr (split) {
        low = to_tf32(x - from_bits(high));
    }
}

template <int depth>
__device__ __forceinline__ void multiply_ieee(Accumulator& acc, const float* a, int a_row, int a_k, const float* b,
                                              int b_k, int b_column) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
        float x[4], y[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = a[(g + 8 * i) * a_row + k * a_k];
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            y[j] = b[k * b_k + (8 * (j / 2) + 2 * t + j % 2) * b_column];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float& c = acc.c[i / 2][j / 2][2 * (i % 2) + j % 2];
                c = fmaf(x[i], y[j], c);
            }
        }
    }
}

template <int depth>
__device__ __forceinline__ void multiply_bf16(Accumulator& acc, const float* a, int a_row, int a_k, const float* b,
                                              int b_k, int b_column) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
        uint32_t x[2][4], y[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float* from = a + (16 * i + g + 8 * (r % 2)) * a_row + (k + 2 * t + 8 * (r / 2)) * a_k;
                x[i][r] = pack_bf16(from[0], from[a_k]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float* from = b + (k + 2 * t + 8 * r) * b_k + (8 * j + g) * b_column;
                y[j][r] = pack_bf16(from[0], from[b_k]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mma_bf16(acc.c[i][j], x[i], y[j]);
            }
        }
    }
}

/// ``split``: three products in place of one, which leave out only that of the two remainders.
template <bool split, int depth>
__device__ __forceinline__ void multiply_tf32(Accumulator& acc, const float* a, int a_row, int a_k, const float* b,
                                              int b_k, int b_column) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < depth; k += 8) {
        uint32_t x[2][4], y[4][2], x_low[2][4], y_low[4][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float from = a[(16 * i + g + 8 * (r % 2)) * a_row + (k + t + 4 * (r / 2)) * a_k];
                to_tf32<split>(from, x[i][r], x_low[i][r]);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float from = b[(k + t + 4 * r) * b_k + (8 * j + g) * b_column];
                to_tf32<split>(from, y[j][r], y_low[j][r]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (split) {  // the small products first
                    mma_tf32(acc.c[i][j], x_low[i], y[j]);
                    mma_tf32(acc.c[i][j], x[i], y_low[j]);
                }
                mma_tf32(acc.c[i][j], x[i], y[j]);
            }
        }
    }
}

/// acc += A B of the warp, over ``depth`` (a multiple of 16). ``a`` is at the warp's (row 0, k 0), ``b`` at
/// (k 0, column 0).
template <Precision precision, int depth>
__device__ __forceinline__ void multiply(Accumulator& acc, const float* a, int a_row, int a_k, const float* b, int b_k,
                                         int b_column) {
    if constexpr (precision == Precision::ieee) {
        multiply_ieee<depth>(acc, a, a_row, a_k, b, b_k, b_column);
    } else if constexpr (precision == Precision::bf16) {
        multiply_bf16<depth>(acc, a, a_row, a_k, b, b_k, b_column);
    } else {
        multiply_tf32<precision == Precision::tf32x3, depth>(acc, a, a_row, a_k, b, b_k, b_column);
    }
}

/// multiply(k, stage) for k = 0, depth, … below ``end``, with copies into the other stage on their way meanwhile.
/// copy(k, stage) starts those; copy(0, 0) has been called. By reference, ``end`` stays a kernel's parameter, which takes
/// no register.
template <int depth, class Copy, class Multiply>
__device__ __forceinline__ void double_buffered(const int& end, const Copy& copy, const Multiply& multiply) {
    for (int k = 0, stage = 0; k < end; k += depth, stage ^= 1) {
        if (k + depth < end) {
            copy(k + depth, stage ^ 1);
            await_copies<1>();
        } else {
            await_copies<0>();
        }
        __syncthreads();
        multiply(k, stage);
        __syncthreads();
    }
}

/// f(row, column, value) for every entry of the warp's product.
template <class F>
__device__ __forceinline__ void for_each_entry(const Accumulator& acc, F f) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                f(16 * i + g + 8 * (r / 2), 8 * j + 2 * t + r % 2, acc.c[i][j][r]);
            }
        }
    }
}

}  // namespace fishleg::cuda
