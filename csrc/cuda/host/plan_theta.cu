// The θ step, and Q u, of a plan.
#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {

/// What the kernels of a θ step are told.
struct Plan::ThetaTables {
    std::vector<Part> parts;
    std::vector<NatSums> nat_sums;
    std::vector<Counter> counters;
};

void Plan::add_block(ThetaTables& tables, size_t k, int64_t workspace, Pointers& pointers, Numbers& numbers,
                     bool after, int times, int64_t ok) {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    NatSums nat{};
    nat.beta = next(numbers), nat.base_lr = next(numbers), nat.step = next(numbers);
    nat.times = times, nat.squared = !after;
    nat.entries = b.flat ? (b.m > b.n ? b.m : b.n) : b.m * b.n;
    nat.flat = b.flat;
    nat.statistics = at<NatStatistics>(workspace, statistics_) + k;
    nat.first = at<const Sums>(workspace, offsets.sums);
    nat.first_count = 1;
    if (b.kind == Kind::uncovered) {
        nat.step_pointer = next<const float>(pointers);
        tables.nat_sums.push_back(nat);
        return;
    }
    float* const momentum = next<float>(pointers);
    require(b, momentum, "momentum");
    const Operator q = operator_at(pointers, k);
    const float* const A = next<const float>(pointers);
    float* const step = next<float>(pointers);
    nat.step_pointer = step;
    nat.first_count = static_cast<int32_t>(offsets.part_tiles);
    if (!after) {
        nat.second = at<const Sums>(workspace, offsets.product_sums);
        nat.second_count = static_cast<int32_t>(offsets.product_tiles);
    }
    tables.nat_sums.push_back(nat);
    if (step) {
        tables.counters.push_back({step, at<const uint8_t>(ok, 0), 0});
    }
    for (Part& p : parts_at(workspace, pointers, k)) {
        p.theta = next<void>(pointers);
        p.lr_pointer = next<const float>(pointers);
        p.lr = static_cast<float>(next(numbers));
        p.decay = static_cast<float>(next(numbers));
        p.weight = static_cast<float>(1 - nat.beta);
        p.lead_weight = static_cast<float>(times == 2 ? 1 - nat.beta * nat.beta : 1 - nat.beta);
        p.momentum = momentum + p.offset;
        p.factor = factor_at(b, q, A, p);
        p.statistics = nat.statistics;
        p.polar = b.flat ? at<float>(workspace, offsets.polar) + p.offset : nullptr;
        p.step_scale = at<const double>(workspace, scales) + k;
        p.ok = at<const uint8_t>(ok, 0);
        tables.parts.push_back(p);
    }
    if (kronecker(b)) {
        products_of(workspace, k, q, A, at<float>(workspace, offsets.x), at<float>(workspace, offsets.y), offsets.ld,
                    at<Sums>(workspace, offsets.product_sums));
    }
}

void Plan::theta_step(Stream stream, int64_t workspace, Pointers pointers, Numbers numbers, bool after, int times,
                      Normalize normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok) {
    const OnDevice guard(device_);
    ThetaTables tables;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        add_block(tables, k, workspace, pointers, numbers, after, times, ok);
    }
    const Numbers coefficients = normalize == Normalize::spectral ? numbers : Numbers{};
    if (coefficients.size() % 6 != 0) {
        throw std::invalid_argument("three numbers are needed for each of an even number of steps to a polar factor");
    }
    all_used(pointers, normalize == Normalize::spectral ? Numbers{} : numbers);
    prepare_all(tables.parts, after, stream);
    run_products(stream);
    if (after) {
        measure_all(tables.parts, stream);
    }
    ThetaDecision decision{};
    decision.statistics = at<const NatStatistics>(workspace, statistics_);
    decision.count = static_cast<int32_t>(blocks_.size());
    decision.normalize = normalize, decision.kappa = kappa;
    decision.scales = at<double>(workspace, scales);
    decision.norms = at<float>(norms, 0), decision.wide_norms = at<double>(wide_norms, 0);
    decision.ok = at<uint8_t>(ok, 0);
    decide_theta(tables.nat_sums, decision, stream);
    unit_all(tables.parts, after, stream);
    polar_factors(stream, workspace, coefficients);
    update_all(tables.parts, after, stream);
    count_all(tables.counters, stream);
}

void Plan::qv(Stream stream, int64_t workspace, Pointers pointers) {
    const OnDevice guard(device_);
    std::vector<Part> parts;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        const Operator q = operator_at(pointers, k);
        const float* const A = next<const float>(pointers);
        float* const out = next<float>(pointers);
        require(b, out, "Q u");
        for (Part& p : parts_at(workspace, pointers, k)) {
            p.factor = factor_at(b, q, A, p);
            p.grad = out + p.offset;
            parts.push_back(p);
        }
        if (kronecker(b)) {
            products_of(workspace, k, q, A, at<float>(workspace, offsets_[k].x), out, b.n, nullptr);
        }
    }
    all_used(pointers, {});
    gather_all(parts, stream);
    run_products(stream);
}

}  // namespace fishleg::cuda
