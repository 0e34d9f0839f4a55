// A plan: what one op needs to know of a list of blocks, found out once. A step then only hands over pointers.
//
// Pointers and numbers come in flat lists. No method allocates device memory, copies from or to the host, or waits for
// the device: kernels are told everything by value, so that a captured graph keeps what it was told.
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
    int64_t offset;          // its first column, or row where axis is 0
    int64_t first_row = -1;  // of the parameter, where it is but some rows of that; -1: all of it
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

// What a step hands over. "Each block" leaves uncovered ones out unless it says otherwise; "each part" is of those.
// Operators are five numbers each block: P or d, its leading dimension, S, its leading dimension, A or 0.

/// Each part: the gradient, 0 for zeros; and a factor of it, or 0.
struct Gradients {
    Pointers g, scale;
};

struct ThetaInputs {
    Gradients gradients;
    Pointers operators, momentum;  // each block
    Pointers steps;                // each block, uncovered ones too: its counter on the device, or 0
    Pointers theta, lr_pointers;   // each part; 0: it is kept; lr is on the host
    Numbers beta, base_lr, step;   // each block, uncovered ones too; steps so far
    Numbers lr, decay;             // each part
    Numbers coefficients;          // (a, b, c) of each step towards polar factors, X ← aX + (bA + cA²)X with A = XXᵀ
};

struct LambdaInputs {
    Gradients gradients;     // of u
    Pointers operators;      // each block
    Pointers adam;           // each block: R and its two moments, L and its two moments; d's and three zeros
    Pointers v, fv, steps;   // each block; its aux_step on the device, or 0
};

/// Where a block's matrices and sums are in the workspace: byte offsets. ``t2`` … ``dR``: of a λ step. ``polar`` …
/// ``polar_arrivals``: of a polar factor; every other step towards it goes to ``turn``.
struct BlockOffsets {
    int64_t x, y, t, t2, M, N, dL, dR, sums, sums_2, product_sums;
    int64_t polar, turn, polar_A, polar_B, polar_sums, polar_scale, polar_norm, polar_arrivals;
    int64_t part_tiles, product_tiles;
    int64_t ld, ld_m;  // leading dimensions of matrices with n and with m columns
};

/// The products of one step towards polar factors, of all blocks of one precision: X is (m, n), A and B are on its
/// shorter side.
struct PolarStep {
    std::vector<Product> gram;    // A = X Xᵀ or XᵀX
    std::vector<Product> square;  // B = bA + cA²; at the first step A²
    std::vector<Product> apply;   // aX + BX or aX + XB
    std::vector<FirstStep> first;
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

    /// Counters on the device go up by one where the step is taken.
    void theta_step(Stream stream, int64_t workspace, const ThetaInputs& inputs, bool after, int times,
                    Normalize normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok);

    /// 𝒜 and α.
    void aux_loss(Stream stream, int64_t workspace, const LambdaInputs& inputs, double damping, bool learn_scale,
                  int64_t loss, int64_t alpha);

    /// Then the gradients and Adam, with the pointers of the latest ``aux_loss``. ``steps``: each block's aux_step.
    void aux_update(Stream stream, int64_t workspace, Numbers steps, bool precondition, double lr, int64_t lr_pointer,
                    double beta1, double beta2, double eps, int64_t ok);

    /// ``outs``: each block's Q u (m, n).
    void qv(Stream stream, int64_t workspace, const Gradients& gradients, Pointers operators, Pointers outs);

    /// Each Kronecker block: R, L, P, its leading dimension, S, its leading dimension.
    void refresh(Stream stream, Pointers pointers);

    const std::vector<BlockLayout>& blocks() const { return blocks_; }
    int device() const { return device_; }

private:
    /// P and S of one block, with their leading dimensions, and A; or d in P's place.
    struct Operator {
        const float* P;
        int64_t ld_P;
        const float* S;
        int64_t ld_S;
        const float* A;
    };
    struct AdamPointers {
        float *value, *exp_avg, *exp_avg_sq;
    };
    struct LambdaFactors {  // of one block in a λ step
        Operator q;
        AdamPointers R, L;
        float* step;
    };
    struct PartPlace {
        int32_t block;
        int64_t tiles;
        int64_t offset;  // of its first entry in (m, n) dense
        int64_t start;   // and in (m, n) with the workspace's leading dimension
    };

    /// The products of a λ step, each kind after the one before it.
    enum Stage { precondition_left, precondition_right, sides, crosses, gradients, stages };

    void add_part(Part part, const Strides& strides, int32_t block, int64_t offset);
    void lay_out();
    void check(size_t expected, size_t found, const char* what) const;
    void check(const Gradients& gradients, Pointers operators) const;
    Operator operator_at(Pointers operators, size_t place, size_t k) const;
    void point(Part& p, size_t i, int64_t workspace, Sums*& sums, const Gradients& gradients) const;
    void products_of(int64_t workspace, size_t k, const Operator& q, const float* x, float* out, int64_t out_ld,
                     Sums* sums);
    void run_products(Stream stream);
    void polar_factors(Stream stream, int64_t workspace, Numbers coefficients);
    NatSums& add_sums(size_t k, int64_t workspace, const ThetaInputs& inputs, bool after, int times);
    void add_products(size_t k, int64_t workspace, const LambdaFactors& f, bool precondition);

    Op op_;
    int device_;
    std::vector<BlockLayout> blocks_;
    std::vector<BlockOffsets> offsets_;
    std::vector<PartPlace> places_;  // of each part
    size_t covered_ = 0;             // blocks
    int64_t statistics_ = 0, aux_ = 0, arrivals_ = 0, sums_ = 0, sums_2_ = 0, sums_count_ = 0, sums_2_count_ = 0;
    // What kernels are told. All of it is kept, so that a step does not allocate; pointers are set at every step.
    Parts<ThetaPart> theta_parts_;
    Parts<AuxPart> aux_parts_;
    std::vector<NatSums> nat_sums_;
    std::vector<Product> first_[4], second_[4], products_[stages][4];  // by precision
    std::vector<Chain> chains_[4];
    PolarStep polar_steps_[4];
    std::vector<LambdaFactors> factors_;
    std::vector<AdamTensor> tensors_;
    std::vector<Counter> counters_;
};

/// ⟨x, y⟩ over pairs of tensors. Pointers: x and y of each; counts; types as numbers of ``Type``, x's and y's of each.
/// ``sums``: memory for one Sums for every ``tile_entries`` begun of each pair, followed by ``more`` given ones.
void inner(int device, Stream stream, Pointers pointers, Pointers counts, Pointers types, int64_t sums, int64_t more,
           int64_t out);

}  // namespace fishleg::cuda
