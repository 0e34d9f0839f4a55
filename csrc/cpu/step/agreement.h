// Whether a layer's gradient is the low-rank product EᵀH that it is thought to be, on one random vector z.
#pragma once

#include <vector>

#include "cpu/step/table.h"

namespace fishleg::cpu {

/// Columns of a gradient, those of one parameter: rows without gaps.
struct Columns {
    const void* grad = nullptr;
    int64_t width = 0;
};

/// A gradient (m, n), with E (r, m), H (r, n) and z (n): all of one type, their rows without gaps.
struct LowRankGradient {
    Dtype dtype = Dtype::float32;
    int64_t rank = 0, rows = 0;
    const void* E = nullptr;
    const void* H = nullptr;
    const void* z = nullptr;
    std::vector<Columns> columns;
};

struct Agreement {
    double size = 0;        // ‖g z‖
    double difference = 0;  // ‖g z − Eᵀ(H z)‖
    double rows = 0;        // √Σ ‖Eₖ‖²‖Hₖ‖² over all r rows
    double square = 0;      // ‖g‖²
};

std::vector<Agreement> agreements(const std::vector<LowRankGradient>& gradients, int threads);

}  // namespace fishleg::cpu
