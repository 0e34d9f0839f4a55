// Q of Kron blocks from their second moments, by inverse Cholesky roots of packed products (gemm/engine.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"

namespace fishleg::cpu {

/// Of one side of a block: float32 matrices (parts, width, width), row by row without gaps, that are diagonal blocks of
/// one of `size` rows and of what pads it. Of the moments the lower halves are read; padding is zero.
struct KfacSide {
    const float* moment = nullptr;  // G or Ā, a sum of a total `weight`
    float* root = nullptr;          // R or L: written where all roots of the block were found
    int64_t size = 0, parts = 1, width = 0;
};

/// One block.
struct KfacStart {
    KfacSide rows, columns;
    double weight = 1;
    double damping = 0;
};

/// (G/weight + √γ/π I)⁻¹ = RᵀR and (Ā/weight + π√γ I)⁻¹ = LLᵀ with π² = (tr Ā/n)/(tr G/m), R and L of one size.
///
/// Returns of each block whether that was done: not where a moment's trace is not finite, or where it is not positive
/// definite as the engine multiplies. Results do not depend on the number of threads.
std::vector<char> start_kfac(const Engine& engine, const std::vector<KfacStart>& blocks, int threads);

}  // namespace fishleg::cpu
