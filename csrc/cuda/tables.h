// What host code tells the kernels: descriptors of matrix products, of parameters and of decisions, passed by value as
// kernel parameters.
#pragma once

#include <cstdint>
#include <vector>

struct CUstream_st;

namespace fishleg::cuda {

using Stream = CUstream_st*;  // cudaStream_t, without CUDA's headers

/// What a thread block found of one tile, and sums of it. Their order is fixed, so that a step repeats bit for bit.
struct Sums {
    double a, b, c;
};

enum class Precision : int32_t { ieee, tf32x3, tf32, bf16 };  // what float32 is multiplied in; sums are float32

/// Which operands of C = A B are stored transposed.
enum class Layout : int32_t { nn, tn, nt };

/// A factor of a product as it is stored.
struct Operand {
    const float* data;
    int32_t ld;
    int32_t aligned;  // whether rows start at multiples of 16 bytes
};

/// One product C (M, N) = A (M, K) B (K, N), row-major with leading dimensions; or with ``add``,
/// C = times·A B + add_times·add, add_times times ``*add_scale`` where there is one.
struct Product {
    Operand operands[2];  // A and B
    float* C;
    const float* outer;  // (M, N) dense or null: C ← outer∘(A B)
    const float* pair;   // as C's layout or null: Σ pair∘(A B) is wanted
    const float* add;    // as C's layout or null
    const float* add_scale;
    Sums* sums;          // of each tile: (Σ C², Σ pair∘(A B), 0), of a symmetric one with its mirror image; or null
    int32_t* arrivals;   // of tiles that are done, zero before; or null
    double* norm;        // ‖C‖, where there is ``arrivals``, which needs ``sums``
    int32_t* clear;      // to become zero, or null
    int32_t ldc;
    int32_t M, N, K;
    Layout layout;
    float times, add_times;
    int32_t symmetric;  // M = N: C is, and half its tiles are computed
    int32_t plus_transpose;  // M = N, Layout::tn or ::nt: C = A B + (A B)ᵀ, and so symmetric
    int32_t tiles, tiles_n;
    int32_t first_tile;
};

/// Q u of a block whose rows of n entries fit in shared memory: C (m, n) = outer∘(P X S).
struct Chain {
    const float* P;  // (m, m) with leading dimension ldp
    const float* X;  // (m, n) with leading dimension ld
    const float* S;  // (n, n) with leading dimension lds
    float* C;        // (m, n) with leading dimension ldc
    const float* outer;
    Sums* sums;  // of each tile: (Σ C², Σ X∘(P X S), 0); or null
    int32_t m, n, ldp, lds, ld, ldc;
    int32_t aligned_p, aligned_s;
    int32_t first_tile;
};

/// The first step towards a polar factor, of which A = X Xᵀ (n, n) and B = A² are known. With ℓ = √‖A²‖, which is at
/// least the largest eigenvalue of A, X and A are to be divided by √ℓ and ℓ: B ← (linear A/ℓ + quadratic B/ℓ²)/√ℓ.
struct FirstStep {
    const float* A;
    float* B;
    const double* norm;  // ‖A²‖
    float* scale;        // 1/√ℓ
    float linear, quadratic;
    int32_t n, ld;
    int32_t first_tile;
};

enum class Type : int32_t { f32, bf16, f16 };

constexpr int most_dims = 4;
struct AuxLoss;
struct NatStatistics;

/// How a parameter, or some of its rows, lies beside the block's matrices. Dimensions are outermost first; unused ones
/// are 1. Parts that lie alike share one.
struct Strides {
    int64_t sizes[most_dims];
    int64_t theta[most_dims], g[most_dims];  // of the parameter and of its gradient
    int64_t matrix[most_dims];               // of (m, n) dense
    int64_t padded[most_dims];               // and of (m, n) with the workspace's leading dimension

    bool operator==(const Strides&) const = default;
};

/// What every pass over the entries of a parameter, or of some of its rows, is told.
struct Part {
    const void* g;        // null: zeros
    const float* scale;   // a factor of g, or null
    const float* factor;  // A (m, n) of a Kron or null; d of a Diagonal. All from here on at the part's first entry
    float* x;             // padded
    float* y;             // padded: the block's Q m̂, or the residual w
    Sums* sums;           // of each tile
    int64_t count;
    int32_t strides;   // number of its Strides
    int32_t diagonal;  // Q u = d²∘u
    Type theta_type, g_type;
    int32_t dims;
    int32_t first_tile;
};

/// Of a θ step.
struct ThetaPart : Part {
    void* theta;  // null: keep it
    float* momentum;
    float* polar;              // padded: nat/‖nat‖, then its polar factor; null: nat is left as it is
    const NatStatistics* nat;  // the block's
    const float* lr_pointer;   // null: lr
    float lr, decay;
    float weight, lead_weight;  // of g in m, 1 − β; and in m̂, 1 − βᵗⁱᵐᵉˢ
};

/// Of a λ step, or of Q u.
struct AuxPart : Part {
    const float* v;  // (m, n) dense
    const float* fv;
    float* grad;  // (m, n) dense: of d; or Q u
    const AuxLoss* aux;
    float damping;  // γ
};

/// Parts of a plan, whose ``strides`` are numbers of ``all``.
template <class Item>
struct Parts {
    std::vector<Strides> all;
    std::vector<Item> items;
    int32_t* arrivals = nullptr;  // to be zero after the first pass
};

constexpr int tile_entries = 4096;  // of a part, by one thread block

/// One tensor of λ under Adam.
struct AdamTensor {
    float* value;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    const float* step_pointer;  // steps so far, on the device; null: ``step``
    const float* lr_pointer;    // null: lr
    const uint8_t* ok;
    double lr, beta1, beta2, eps, step;
    int64_t count;
    int32_t first_tile;
};

/// A counter of steps on the device, to go up by one where the step is taken.
struct Counter {
    float* value;
    const uint8_t* ok;
    int32_t first_tile;
};

/// What is known of a block's nat when the step is decided, and then the decision.
struct NatStatistics {
    double norm;   // ‖nat‖, corrected
    double power;  // lr₀² m̂ᵀnat, corrected
    double correction;
    double scale;     // c over the bias correction of the block, or of a polar factor
    int64_t entries;  // m n; max(m, n) where nat gives way to its polar factor
    int32_t gradient_is_zero;
    int32_t flat;   // whether it does
    int32_t taken;  // whether the step is
    float* step;    // a counter on the device that then goes up by one, or null
};

/// Where one block's sums are: (Σ nat², Σ m̂∘nat, entries of g that are not zero).
struct NatSums {
    const Sums* first;  // of the pass over the parameters
    const Sums* second;  // of the products
    int32_t first_count, second_count;
    int64_t entries;  // these are the statistics'
    int32_t flat;
    const float* step_pointer;  // steps so far, on the device; null: ``step``
    float* counted;             // the same where it is to go up by one
    double step, beta, base_lr;
    int32_t times;              // how often g is averaged into m̂
    int32_t squared;            // both factors of the power are without their bias correction
    NatStatistics* statistics;
    int32_t first_tile;  // its number, one thread block each
};

enum class Normalize : int32_t { none, rms, trust, spectral };

/// The decision about a θ step.
struct ThetaDecision {
    NatStatistics* statistics;
    int32_t count;
    Normalize normalize;
    double kappa;
    double* scales;       // of each block: c over the bias correction
    float* norms;         // of each block
    double* wide_norms;   // the same
    uint8_t* ok;
    int32_t* arrivals;  // of thread blocks at the decision: zero
};

/// 𝒜 and the best multiple of Q, from the sums (uᵀv, vᵀF v, vᵀv) of all tiles.
struct AuxLoss {
    double alpha, loss, power;
};

struct AuxLossJob {
    const Sums* sums;
    int64_t count;
    double damping;
    int32_t learn_scale;
    AuxLoss* out;
    float* loss;
    float* alpha;
};

/// The decision about a λ step, from the sums of squares of all gradients.
struct AuxDecision {
    const Sums* sums;
    int64_t count;
    const AuxLoss* aux;
    uint8_t* ok;
};

/// ⟨x, y⟩ of two tensors that lie alike, without gaps.
struct Pair {
    const void* x;
    const void* y;
    Sums* sums;
    int64_t count;
    Type x_type, y_type;
    int32_t first_tile;
};

/// The sum of Σ a of all tiles.
struct Total {
    const Sums* sums;
    int64_t count;
    float* out;
};

}  // namespace fishleg::cuda
