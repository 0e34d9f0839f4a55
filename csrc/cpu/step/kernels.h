// The passes over memory, compiled once for each instruction set (kernels.cpp); kernels() chooses at run time.
#pragma once

#include "cpu/step/table.h"

namespace fishleg::cpu {

/// What a pass over a block's elements needs to know beside the block.
struct Pass {
    double average;    // weight of g in m̂, from m
    double follow;     // weight of g in m, and of Q g in Q m: 1 − β
    double nesterov;   // weight of Q m beside Q g in nat of a low-rank gradient
    double scale;      // c, with the bias correction: of nat in the update
};

/// Sums over some elements of a block.
struct Sums {
    double square = 0;          // nat²
    double power = 0;           // m̂ nat, or g nat with momentum after Q
    bool gradient = false;      // whether any element of g is not zero
};

struct Kernels {
    const char* name;
    // m̂ of a block's elements into `out`, dense as the block is. Returns whether any element of g is not zero.
    bool (*average)(const Block&, const WorkItem&, const Pass&, void* out);
    Sums (*sums)(const Block&, const WorkItem&, const Pass&, bool with_gradient, bool with_power);
    void (*apply)(const Block&, const WorkItem&, const Pass&);
    // Whether those entries of the gradient are finite.
    bool (*finite)(const AdamTensor&, const AdamSlice&);
    void (*adam)(const AdamTensor&, const AdamSlice&, double lr, double beta1, double beta2, double eps);
    // ⟨x, z⟩ and ‖x‖² of four vectors of λ's type, `stride` elements after each other.
    void (*probe)(const void* x, int64_t stride, const void* z, int64_t count, double dots[4], double squares[4]);
    // out += c x, for x of λ's type.
    void (*add)(const void* x, double c, int64_t count, double* out);
    // ⟨x, y⟩ over elements begin … end, for numbers of any type.
    double (*inner)(const Pair&, int64_t begin, int64_t end);
};

/// For λ of float32 or float64, and the best instruction set that this processor has.
const Kernels& kernels(Dtype dtype);

}  // namespace fishleg::cpu
