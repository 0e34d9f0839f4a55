// Q of Kron blocks from their second moments, by inverse Cholesky roots of packed products (gemm/engine.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"

namespace fishleg::cpu {

/// One block: float32 matrices, row by row without gaps. Of the moments the lower halves are read.
struct KfacStart {
    const float* rows = nullptr;     // G (m, m) and Ā (n, n), sums of a total `weight`
    const float* columns = nullptr;
    float* R = nullptr;              // (m, m) and (n, n): written where both roots were found
    float* L = nullptr;
    int64_t m = 0, n = 0;
    double weight = 1;
    double damping = 0;
};

/// (G/weight + √γ/π I)⁻¹ = RᵀR and (Ā/weight + π√γ I)⁻¹ = LLᵀ with π² = (tr Ā/n)/(tr G/m), R and L of one size.
///
/// Returns of each block whether that was done: not where a moment's trace is not finite, or where it is not positive
/// definite as the engine multiplies. Results do not depend on the number of threads.
std::vector<char> start_kfac(const Engine& engine, const std::vector<KfacStart>& blocks, int threads);

}  // namespace fishleg::cpu
