// Products of matrices that were packed once and are used often (engine.h).
//
// A result can be left as a matrix, or packed as an operand of the next product without ever being one.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"

namespace fishleg::cpu {

/// Bytes of a packed operand.
int64_t packed_size(const Engine& engine, int64_t lanes, int64_t depth);

struct PackJob {
    Side side = Side::left;
    Lanes from;
    void* to = nullptr;
    int64_t depth = 0;  // of the operand, where `from` is only what starts at `after`, a multiple of the depth step
    int64_t after = 0;
};

/// Pack all of them, on several threads.
void pack(const Engine& engine, const std::vector<PackJob>& jobs, int threads);

/// The product of two panels, of which the first rows × columns are written to `out`, and nothing beyond them.
void multiply_tile(const Engine& engine, const void* left, const void* right, int64_t depth, int64_t rows,
                   int64_t columns, float* out, int64_t stride);

/// Where a product goes: a matrix, or a packed operand (its rows, or its columns, are the lanes).
enum class Target : int { matrix, left, right };

struct Product {
    const void* left = nullptr;
    const void* right = nullptr;
    int64_t rows = 0;
    int64_t columns = 0;
    int64_t depth = 0;
    Target target = Target::matrix;
    void* out = nullptr;
    int64_t stride = 0;      // of a matrix's rows
    bool symmetric = false;  // rows = columns, and known to be: the upper half is taken from the lower one
    // A matrix out becomes beta out + alpha XY.
    float alpha = 1;
    float beta = 0;
};

/// Compute all of them, none of which needs another, on several threads. The result does not depend on their number.
void multiply(const Engine& engine, const std::vector<Product>& products, int threads);

/// A matrix as the product of two packed operands, of which some rows and columns are multiplied at a time.
struct PackedFactors {
    const void* left = nullptr;
    const void* right = nullptr;
    int64_t depth = 0;
};

/// The largest magnitude in a packed operand; infinite where one is not finite.
float largest(const Engine& engine, const void* packed, int64_t lanes, int64_t depth);

/// Some rows and columns of a matrix, both of which begin where a panel does.
struct Rectangle {
    int64_t row_begin, row_end, column_begin, column_end;
};

/// A rectangle of a product into `out`, row by row with `stride`.
void multiply_rectangle(const Engine& engine, const PackedFactors& factors, const Rectangle& of, float* out,
                        int64_t stride);

/// The same into scratch memory of this thread, which holds it until the thread's next call. Sets `stride`.
const float* multiply_into_scratch(const Engine& engine, const PackedFactors& factors, const Rectangle& of,
                                   int64_t* stride);

}  // namespace fishleg::cpu
