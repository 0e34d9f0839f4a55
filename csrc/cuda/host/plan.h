// A plan: what one op needs to know of a list of blocks, found out once. A step then only hands over pointers.
//
// Pointers and numbers come in flat lists, in the order that the comment of each method gives; no method allocates
// device memory, copies from or to the host, or waits for the device.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/tables.h"

namespace fishleg::cuda {

/// uncovered: torch computes it, and hands over its sums. A structure's name otherwise.
enum class Kind : int { uncovered, kron, scaled_kron, diagonal };

enum class Op : int { theta, lambda, qv, refresh };

struct PartLayout {
    std::vector<int64_t> shape;
    std::vector<int64_t> theta_strides, g_strides;
    Type theta_type, g_type;
    int64_t offset;  // its first column, or row where axis is 0
};

struct BlockLayout {
    std::string name;
    Kind kind;
    Precision precision;
    int64_t m, n;
    int axis;  // see fishleg_fast/model/block.py
    std::vector<PartLayout> parts;
    bool flat = false;  // whether its θ steps take the polar factor of nat
};

using Pointers = std::span<const int64_t>;
using Numbers = std::span<const double>;

/// Where a block's matrices and sums are in the workspace: byte offsets. ``t2`` … ``dR``: of a λ step. ``polar`` …
/// ``polar_scale``: of a polar factor; every other step towards it goes to ``turn``.
struct BlockOffsets {
    int64_t x, y, t, t2, M, N, dL, dR, sums, sums_2, product_sums;
    int64_t polar, turn, polar_A, polar_B, polar_sums, polar_scale;
    int64_t part_tiles, product_tiles, polar_tiles;
    int64_t ld, ld_m;  // leading dimensions of matrices with n and with m columns
};

class Plan {
public:
    Plan(Op op, std::vector<BlockLayout> blocks, int device);

    /// The workspace's size, and where in it the caller puts the sums of uncovered blocks (three doubles each, in the
    /// order of the blocks) and finds the scales of all blocks (doubles); in bytes. ``external_2``: of the λ step's
    /// gradients.
    int64_t workspace_bytes = 0, external = 0, external_2 = 0, scales = 0;

    /// Where (m, n) with rows that start at multiples of four entries is of block ``k``, whose nat gives way to its polar
    /// factor: of an uncovered block the caller puts nat/‖nat‖ there before a θ step, and finds the factor after it.
    int64_t polar(size_t k) const { return offsets_.at(k).polar; }

    /// Pointers, each block: momentum, P or d, its leading dimension, S, its leading dimension, A, step on the device or
    /// 0; each part: g or 0, scale or 0, θ or 0, lr or 0.
    /// Numbers: each block: β, lr₀, steps so far; each part: lr, decay. Uncovered blocks have step pointers alone.
    /// Then (a, b, c) of each step towards polar factors, X ← aX + (bA + cA²)X with A = XXᵀ: an even number of them.
    void theta_step(Stream stream, int64_t workspace, Pointers pointers, Numbers numbers, bool after, int times,
                    Normalize normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok);

    /// 𝒜 and α. Pointers, each block: P, S (as above); R and its two moments; L and its two moments (d's in R's place);
    /// v, fv; aux_step on the device or 0; each part: u, scale or 0. Uncovered blocks: none.
    void aux_loss(Stream stream, int64_t workspace, Pointers pointers, double damping, bool learn_scale, int64_t loss,
                  int64_t alpha);

    /// Then the gradients and Adam, with the pointers of the latest ``aux_loss``. ``steps``: each block's aux_step.
    void aux_update(Stream stream, int64_t workspace, Numbers steps, double damping, bool precondition, double lr,
                    int64_t lr_pointer, double beta1, double beta2, double eps, int64_t ok);

    /// Pointers, each block: P or d, S (as above), A, Q u (m, n); each part: u, scale or 0.
    void qv(Stream stream, int64_t workspace, Pointers pointers);

    /// Pointers, each block: R, L, P, its leading dimension, S, its leading dimension.
    void refresh(Stream stream, Pointers pointers);

private:
    /// P and S of one block, with their leading dimensions; or d in P's place.
    struct Operator {
        const float* P;
        int64_t ld_P;
        const float* S;
        int64_t ld_S;
    };
    struct AdamPointers {
        float *value, *exp_avg, *exp_avg_sq;
    };
    struct LambdaFactors {  // of one block in a λ step
        Operator q;
        AdamPointers R, L;
        float* step;
    };
    struct ThetaTables;
    struct GradientProducts;

    void lay_out();
    Operator operator_at(Pointers& pointers, size_t k) const;
    std::vector<Part> parts_at(int64_t workspace, Pointers& pointers, size_t k) const;
    static const float* factor_at(const BlockLayout& b, const Operator& q, const float* A, const Part& p);
    void products_of(int64_t workspace, size_t k, const Operator& q, const float* outer, const float* x, float* out,
                     int64_t out_ld, Sums* sums);
    void run_products(Stream stream);
    void polar_factors(Stream stream, int64_t workspace, Numbers coefficients);
    void add_block(ThetaTables& tables, size_t k, int64_t workspace, Pointers& pointers, Numbers& numbers, bool after,
                   int times, int64_t ok);
    void add_block(GradientProducts& products, size_t k, int64_t workspace, const LambdaFactors& f,
                   bool precondition) const;

    Op op_;
    int device_;
    std::vector<BlockLayout> blocks_;
    std::vector<std::vector<Part>> templates_;  // of each block's parts: all but pointers
    std::vector<BlockOffsets> offsets_;
    int64_t statistics_ = 0, aux_ = 0, sums_ = 0, sums_2_ = 0, sums_count_ = 0, sums_2_count_ = 0;
    // Products by precision; kept, so that a step does not allocate.
    std::vector<Product> first_[4], second_[4];
    std::vector<Chain> chains_[4];
    std::vector<Part> parts_;       // of the λ step under way
    std::vector<LambdaFactors> factors_;
};

/// ⟨x, y⟩ over pairs of tensors. Pointers: x and y of each; counts; types as numbers of ``Type``, x's and y's of each.
/// ``sums``: memory for one Sums for every ``tile_entries`` begun of each pair, followed by ``more`` given ones.
void inner(int device, Stream stream, Pointers pointers, Pointers counts, Pointers types, int64_t sums, int64_t more,
           int64_t out);

}  // namespace fishleg::cuda
