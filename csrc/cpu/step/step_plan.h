// A plan: the θ step of a list of blocks, and Adam on their λ, as passes over memory on several threads.
//
// Products of matrices are the caller's, but where it gives their packed operands (products.h): those are multiplied
// inside the passes. Pointers are the caller's, and have to be valid while a method runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/step/kernels.h"

namespace fishleg::cpu {

enum class Normalize : int { none, rms, trust };

struct ThetaOptions {
    int times = 1;  // how often g is averaged into m̂: 1, or 2 with nesterov
    Normalize normalize = Normalize::rms;
    double kappa = 0;
    int threads = 1;
};

class Plan {
public:
    /// std::invalid_argument, naming the block, where a descriptor makes no sense.
    explicit Plan(std::vector<Block> blocks);

    std::vector<Block>& blocks() { return blocks_; }

    /// What multiplies the panels that blocks are given.
    void use(const Engine& engine) { engine_ = &engine; }

    /// m̂ of the blocks that have a place in `outs` (dense, in λ's type). The θ step then need not read g for its zeros.
    void average(const std::vector<void*>& outs, const ThetaOptions& options);

    /// One step. ‖nat‖ of each block into `norms`; false, and nothing else written, where one is not finite.
    bool theta_step(const ThetaOptions& options, double* norms);

private:
    Pass pass_of(const Block& block, int times) const;
    void check() const;
    template <class F>
    void with_given(const Task& task, bool first, F f) const;

    std::vector<Block> blocks_;
    std::vector<Task> tasks_;
    const Engine* engine_ = nullptr;
    std::vector<int> gradient_seen_;  // by average(): −1 not looked at, 0 all zero, 1 not
};

struct AdamOptions {
    double lr, beta1, beta2, eps;
    int threads;
    const Engine* engine = nullptr;  // of gradients that are products of panels
};

/// One Adam step of every tensor; false, and nothing written, where a gradient is not finite.
bool adam_step(const std::vector<AdamTensor>& tensors, const AdamOptions& options);

/// Σ ⟨x, y⟩ over all pairs; the same for any number of threads.
double inner(const std::vector<Pair>& pairs, int threads);

}  // namespace fishleg::cpu
