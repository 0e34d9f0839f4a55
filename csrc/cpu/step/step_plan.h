// A plan of θ steps: for a list of blocks, passes over memory (kernels.h) on several threads.
//
// Products of matrices are the caller's, but where it gives packed factors (gemm/products.h): those are multiplied
// inside the passes. Pointers are the caller's, and have to be valid while a method runs.
#pragma once

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

class StepPlan {
public:
    /// std::invalid_argument, naming the block, where a descriptor makes no sense.
    explicit StepPlan(std::vector<Block> blocks);

    std::vector<Block>& blocks() { return blocks_; }

    /// What multiplies the packed factors that blocks are given.
    void use(const Engine& engine) { engine_ = &engine; }

    /// m̂ of the blocks that have a place in `outs` (dense, in λ's type). The θ step then need not read g for its zeros.
    void average(const std::vector<void*>& outs, const ThetaOptions& options);

    /// One step. ‖nat‖ of each block into `norms`; false, and nothing else written, where one is not finite.
    bool theta_step(const ThetaOptions& options, double* norms);

private:
    void check() const;
    Pass pass_of(const Block& block, int times) const;
    template <class F>
    void with_given(const WorkItem& item, bool first, F f) const;
    std::vector<Sums> sums(const ThetaOptions& options, const std::vector<Pass>& passes,
                           const std::vector<int>& seen) const;

    std::vector<Block> blocks_;
    std::vector<WorkItem> items_;
    const Engine* engine_ = nullptr;
    std::vector<int> gradient_seen_;  // by average(): −1 not looked at, 0 all zero, 1 not
};

}  // namespace fishleg::cpu
