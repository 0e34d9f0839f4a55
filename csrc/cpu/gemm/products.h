// Products of matrices that were packed once and are used often, on the CPU's matrix or vector units.
//
// A left operand X (rows × depth) and a right operand Y (depth × columns) are packed alike, as `lanes` (rows of X,
// columns of Y) by depth: panels of 32 lanes, of which each holds its depth in order, padded with zeros. A result can be
// left as a matrix, or packed as an operand of the next product without ever being one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fishleg::cpu {

constexpr int64_t panel = 32;  // lanes that go together

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

/// What multiplies panels, and how it wants them. Operands are of `size` bytes an element; the depth is padded to
/// multiples of `step`.
struct Engine {
    const char* name;
    int64_t size;
    int64_t step;
    // Around everything that follows, on every thread: the matrix unit's configuration, which is then as it was before.
    void (*enter)(void* saved);  // 64 bytes
    void (*leave)(const void* saved);
    // Up to 32 lanes into a panel, or (from 32 lanes of depth 32) into the part of one that starts at such a depth.
    void (*pack)(Side side, const Lanes& from, void* to);
    // c (32 × 32, row by row) = XY, or c + XY, of two panels, over `depth`. Of c only the first rows × columns (at least
    // one of each) need be right; any of it may be written.
    void (*block)(const void* left, const void* right, int64_t depth, int64_t rows, int64_t columns, float* c,
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

/// Bytes of a packed operand.
int64_t packed_size(const Engine& engine, int64_t lanes, int64_t depth);

struct PackJob {
    Side side = Side::left;
    Lanes from;
    void* to = nullptr;
    int64_t depth = 0;  // of the operand, where `from` is only the part that starts at `after`, a multiple of the step
    int64_t after = 0;
};

/// Pack all of them, on several threads.
void pack(const Engine& engine, const std::vector<PackJob>& jobs, int threads);

/// One `block` of two panels whose first rows × columns are written to `out`, and nothing beyond them.
void multiply_block(const Engine& engine, const void* left, const void* right, int64_t depth, int64_t rows,
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

/// Two packed operands, of which some rows and columns are multiplied at a time.
struct Factors {
    const void* left = nullptr;
    const void* right = nullptr;
    int64_t depth = 0;
};

/// The largest magnitude in a packed operand; infinite where one is not finite.
float largest(const Engine& engine, const void* packed, int64_t lanes, int64_t depth);

/// Some rows and columns of a matrix, whose first ones are a panel's.
struct Part {
    int64_t row_begin, row_end, column_begin, column_end;
};

/// A part of a product into `out`, row by row with `stride`.
void multiply_part(const Engine& engine, const Factors& factors, const Part& of, float* out, int64_t stride);

/// The same into memory of this thread, which holds it until the thread's next call. Sets `stride`.
const float* part_of(const Engine& engine, const Factors& factors, const Part& of, int64_t* stride);

}  // namespace fishleg::cpu
