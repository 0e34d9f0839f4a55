// The θ step, and Q u, of a plan.
#include "cuda/device/auxiliary.h"
#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {

/// Where one block's sums are, and what its decision needs besides.
NatSums& Plan::add_sums(size_t k, int64_t workspace, const ThetaInputs& inputs, bool after, int times) {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    NatSums nat{};
    nat.beta = inputs.beta[k], nat.base_lr = inputs.base_lr[k], nat.step = inputs.step[k];
    nat.step_pointer = at<const float>(inputs.steps[k], 0);
    nat.times = times, nat.squared = !after;
    nat.entries = b.flat ? (b.m > b.n ? b.m : b.n) : b.m * b.n;
    nat.flat = b.flat;
    nat.statistics = at<NatStatistics>(workspace, statistics_) + k;
    nat.first = at<const Sums>(workspace, offsets.sums);
    nat.first_count = 1;
    if (b.kind != Kind::uncovered) {
        nat.counted = at<float>(inputs.steps[k], 0);
        nat.first_count = static_cast<int32_t>(offsets.part_tiles);
        if (!after) {
            nat.second = at<const Sums>(workspace, offsets.product_sums);
            nat.second_count = static_cast<int32_t>(offsets.product_tiles);
        }
    }
    return nat_sums_.emplace_back(nat);
}

void Plan::theta_step(Stream stream, int64_t workspace, const ThetaInputs& inputs, bool after, int times,
                      Normalize normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok) {
    const OnDevice guard(device_);
    const size_t count = places_.size();
    check(inputs.gradients, inputs.operators);
    check(covered_, inputs.momentum.size(), "momenta");
    check(blocks_.size(), inputs.steps.size(), "counters"), check(blocks_.size(), inputs.step.size(), "steps");
    check(blocks_.size(), inputs.beta.size(), "betas"), check(blocks_.size(), inputs.base_lr.size(), "first rates");
    check(count, inputs.theta.size(), "parameters"), check(count, inputs.decay.size(), "decays");
    check(count, inputs.lr.size(), "rates"), check(count, inputs.lr_pointers.size(), "rates on the device");
    if (inputs.coefficients.size() % 6 != 0) {
        throw std::invalid_argument("three numbers are needed for each of an even number of steps to a polar factor");
    }
    nat_sums_.clear();
    Sums* sums = at<Sums>(workspace, sums_);
    for (size_t k = 0, place = 0, i = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        const BlockOffsets& offsets = offsets_[k];
        const NatSums& nat = add_sums(k, workspace, inputs, after, times);
        if (b.kind == Kind::uncovered) {
            continue;
        }
        float* const momentum = at<float>(inputs.momentum[place], 0);
        require(b, momentum, "momentum");
        const Operator q = operator_at(inputs.operators, place++, k);
        const float weight = static_cast<float>(1 - nat.beta);
        for (; i < count && places_[i].block == static_cast<int32_t>(k); ++i) {
            ThetaPart& p = theta_parts_.items[i];
            const int64_t offset = places_[i].offset;
            point(p, i, workspace, sums, inputs.gradients);
            p.theta = at<void>(inputs.theta[i], 0);
            p.lr_pointer = at<const float>(inputs.lr_pointers[i], 0);
            p.lr = static_cast<float>(inputs.lr[i]), p.decay = static_cast<float>(inputs.decay[i]);
            p.weight = weight;
            p.lead_weight = times == 2 ? static_cast<float>(1 - nat.beta * nat.beta) : weight;
            p.momentum = momentum + offset;
            p.factor = !kronecker(b) ? q.P + offset : q.A ? q.A + offset : nullptr;
            p.nat = nat.statistics;
            p.polar = b.flat ? at<float>(workspace, offsets.polar) + places_[i].start : nullptr;
        }
        if (kronecker(b)) {
            products_of(workspace, k, q, at<float>(workspace, offsets.x), at<float>(workspace, offsets.y), offsets.ld,
                        at<Sums>(workspace, offsets.product_sums));
        }
    }
    theta_parts_.arrivals = at<int32_t>(workspace, arrivals_);
    prepare_all(theta_parts_, after, stream);
    run_products(stream);
    if (after) {
        measure_all(theta_parts_, stream);
    }
    ThetaDecision decision{};
    decision.statistics = at<NatStatistics>(workspace, statistics_);
    decision.count = static_cast<int32_t>(blocks_.size());
    decision.normalize = normalize, decision.kappa = kappa;
    decision.scales = at<double>(workspace, scales);
    decision.norms = at<float>(norms, 0), decision.wide_norms = at<double>(wide_norms, 0);
    decision.ok = at<uint8_t>(ok, 0);
    decision.arrivals = theta_parts_.arrivals;
    decide_theta(nat_sums_, decision, stream);
    unit_all(theta_parts_, after, stream);
    polar_factors(stream, workspace, inputs.coefficients);
    update_all(theta_parts_, after, stream);
}

void Plan::qv(Stream stream, int64_t workspace, const Gradients& gradients, Pointers operators, Pointers outs) {
    const OnDevice guard(device_);
    check(gradients, operators);
    check(covered_, outs.size(), "results");
    Sums* sums = at<Sums>(workspace, sums_);
    for (size_t k = 0, place = 0, i = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        float* const out = at<float>(outs[place], 0);
        require(b, out, "Q u");
        const Operator q = operator_at(operators, place++, k);
        for (; i < places_.size() && places_[i].block == static_cast<int32_t>(k); ++i) {
            AuxPart& p = aux_parts_.items[i];
            const int64_t offset = places_[i].offset;
            point(p, i, workspace, sums, gradients);
            p.factor = !kronecker(b) ? q.P + offset : q.A ? q.A + offset : nullptr;
            p.grad = out + offset;
        }
        if (kronecker(b)) {
            products_of(workspace, k, q, at<float>(workspace, offsets_[k].x), out, b.n, nullptr);
        }
    }
    gather_all(aux_parts_, stream);
    run_products(stream);
}

}  // namespace fishleg::cuda
