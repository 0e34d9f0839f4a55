// What the passes over memory are told: of blocks, of λ and of vectors, where they are. Strides count elements.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/gemm/products.h"

namespace fishleg::cpu {

enum class Dtype : int { float32, float64, bfloat16, float16 };

/// A matrix somewhere in memory, seen as rows × columns.
struct View {
    void* data = nullptr;
    int64_t row_stride = 0;
    int64_t column_stride = 0;
    Dtype dtype = Dtype::float32;
};

/// A parameter, or some of its rows, as columns first … first + width of its block.
struct Part {
    int64_t first = 0;
    int64_t width = 0;
    View param;
    View grad;           // data null: zeros
    bool moves = true;   // whether the parameter has a gradient, and so is moved
    double lr = 0;
    double weight_decay = 0;
};

/// How a block's natural gradient comes about, element by element.
enum class Source : int {
    product,         // nat = Q m̂ is given
    low_rank,        // Q g is given, as it is or as packed factors, and Q m of the step before
    diagonal,        // nat = d² m̂
    after,           // momentum after Q: x = Q g is given
    after_diagonal,  // momentum after Q: x = d² g
};

/// One layer's parameters as a matrix. All matrices but those of parts are dense, row by row.
struct Block {
    std::string name;
    Dtype dtype = Dtype::float32;  // of λ and all of the block's own matrices
    int64_t rows = 0;
    int64_t columns = 0;
    std::vector<Part> parts;
    void* momentum = nullptr;
    float* step = nullptr;         // how often it was stepped
    void* diagonal = nullptr;      // d
    // Of this step:
    Source source = Source::product;
    const void* given = nullptr;   // Q m̂, or Q g
    PackedFactors factors;         // instead of Q g: (E P)ᵀ and H S
    float* scratch = nullptr;      // for their product, or null: both passes multiply
    void* product = nullptr;       // Q m, which follows
    double fixed_scale = 0;        // of nat as it was given, bias correction included; 0: as `normalize` says
    double beta = 0;
    double base_lr = 0;            // before any schedule
};

/// Some rows and columns of a block, or of another matrix of a list: what one thread does at a time.
struct WorkItem {
    int index;  // of the block
    int64_t row_begin, row_end, column_begin, column_end;
    const void* given = nullptr;  // these rows and columns of Q g, where they were computed for this item alone
    int64_t given_stride = 0;
};

/// One of λ's tensors with Adam's moments and the gradient.
struct AdamTensor {
    std::string name;
    int64_t count = 0;
    void* value = nullptr;
    void* exp_avg = nullptr;
    void* exp_avg_sq = nullptr;
    const void* grad = nullptr;
    Dtype grad_dtype = Dtype::float32;
    Dtype dtype = Dtype::float32;
    double step = 0;      // that of its block, this one included
    PackedFactors factors;  // instead of a gradient: that of a matrix of `columns`
    int64_t columns = 0;
};

/// Some of a tensor's entries: begin … end, and so in each of `rows` rows that start `stride` entries after each other.
/// The gradient is where the tensor has it or, where given, here: rows of its own stride.
struct AdamSlice {
    int64_t begin = 0, end = 0;
    int64_t rows = 1, stride = 0;
    const float* grad = nullptr;
    int64_t grad_stride = 0;
};

/// Two vectors of one type, for their inner product.
struct Pair {
    const void* x = nullptr;
    const void* y = nullptr;
    int64_t count = 0;
    Dtype dtype = Dtype::float32;
};

}  // namespace fishleg::cpu
