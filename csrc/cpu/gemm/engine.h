// What multiplies packed matrices: a CPU's matrix or vector units, and how each wants its operands.
//
// A left operand X (rows × depth) and a right operand Y (depth × columns) are packed alike, as `lanes` (rows of X,
// columns of Y) by depth: panels of 32 lanes, of which each holds its depth in order, padded with zeros.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fishleg::cpu {

constexpr int64_t panel = 32;  // lanes of one

enum class Side : int { left, right };

/// Where a float32 matrix is read from, as lanes × depth: element (l, k) is source[l·lane_stride + k·depth_stride].
/// One of the strides is 1.
struct Lanes {
    const float* source = nullptr;
    int64_t lanes = 0;
    int64_t depth = 0;
    int64_t lane_stride = 0;
    int64_t depth_stride = 0;
};

/// What multiplies panels, and how it wants them. The depth is padded to multiples of `depth_step`.
struct Engine {
    const char* name;
    int64_t element_bytes;  // of operands
    int64_t depth_step;
    // Around everything that follows, on every thread: the matrix unit's configuration, which is then as it was before.
    void (*enter)(void* saved);  // 64 bytes
    void (*leave)(const void* saved);
    // Up to 32 lanes into a panel, or (from 32 lanes of depth 32) into the part of one that starts at such a depth.
    void (*pack)(Side side, const Lanes& from, void* to);
    // A tile c (32 × 32, row by row) = XY, or c + XY, of two panels, over `depth`. Of c only the first rows × columns
    // (at least one of each) need be right; any of it may be written.
    void (*microkernel)(const void* left, const void* right, int64_t depth, int64_t rows, int64_t columns, float* c,
                        int64_t stride, bool add);
};

/// bfloat16 operands and float32 sums on AMX's tiles; null where this processor, or its kernel, has none.
const Engine* amx_engine();

/// The same with every operand split into two bfloat16 numbers: 16 of float32's 24 bits, at a third of the speed.
const Engine* amx_split_engine();

/// float32 operands and sums on AVX-512; null just so.
const Engine* avx512_engine();

/// All that this processor has.
std::vector<const Engine*> engines();

/// The engine of that name; std::invalid_argument where it is not to be had.
const Engine& engine_of(const std::string& name);

}  // namespace fishleg::cpu
