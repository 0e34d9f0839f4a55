// Adam on λ, in one pass over all its tensors.
#pragma once

#include <vector>

#include "cpu/gemm/engine.h"
#include "cpu/step/table.h"

namespace fishleg::cpu {

struct AdamOptions {
    double lr, beta1, beta2, eps;
    int threads;
    const Engine* engine = nullptr;  // of gradients that are packed factors
};

/// One Adam step of every tensor; false, and nothing written, where a gradient is not finite.
bool adam_step(const std::vector<AdamTensor>& tensors, const AdamOptions& options);

}  // namespace fishleg::cpu
