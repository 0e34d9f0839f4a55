// The base case of inverse_root.h, one tile of 32 × 32: compiled once for each instruction set.
#pragma once

namespace fishleg::cpu {

/// The function (a, x) for this processor: x = C⁻¹ of a = C Cᵀ, all of it, row by row; a is overwritten. Whether a is
/// positive definite.
bool (*tile_inverse_root())(float* a, float* x);

}  // namespace fishleg::cpu
