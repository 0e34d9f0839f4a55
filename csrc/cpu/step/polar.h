// Polar factors of matrices by odd polynomials (fishleg_fast/algebra/polar.py), symmetric products by half their tiles.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"

namespace fishleg::cpu {

/// x (m, n), row by row without gaps, which becomes its polar factor.
struct PolarMatrix {
    float* x = nullptr;
    int64_t m = 0, n = 0;
    int64_t together = 1;  // steps on A = X Xᵀ, of the smaller side, to a product with X
};

/// X ← aX + (bA + cA²)X for each of the coefficients, X ← X/‖X‖ and a bound of its largest singular value before.
///
/// The engine packs left and right operands alike. Small matrices are each one thread's.
void polar_factors(const Engine& engine, const std::vector<PolarMatrix>& matrices,
                   const std::vector<std::array<float, 3>>& coefficients, int threads);

}  // namespace fishleg::cpu
