// The θ step, and Q u, of a plan.
#include "cuda/host/plan_parts.h"
#include "cuda/device/products.h"
#include "cuda/device/theta.h"

namespace fishleg::cuda {

void Plan::theta_step(Stream stream, int64_t workspace, Pointers pointers, Numbers numbers, bool after, int times,
                      Normalize normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok) {
    const OnDevice guard(device_);
    std::vector<Part> parts;
    std::vector<Claim> claims;
    std::vector<Counter> counters;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        const Room& r = rooms_[k];
        Claim claim{};
        claim.beta = next(numbers), claim.base_lr = next(numbers), claim.step = next(numbers);
        claim.times = times, claim.squared = !after;
        claim.entries = b.m * b.n;
        claim.account = at<Account>(workspace, accounts_) + k;
        claim.first = at<const Sums>(workspace, r.sums);
        claim.first_count = 1;
        if (b.kind == Kind::outside) {
            claim.step_pointer = next<const float>(pointers);
            claims.push_back(claim);
            continue;
        }
        float* const momentum = next<float>(pointers);
        require(b, momentum, "momentum");
        const Operator q = operator_at(pointers, k);
        const float* const A = next<const float>(pointers);
        float* const step = next<float>(pointers);
        claim.step_pointer = step;
        claim.first_count = static_cast<int32_t>(r.part_tiles);
        if (!after) {
            claim.second = at<const Sums>(workspace, r.product_sums);
            claim.second_count = static_cast<int32_t>(r.product_tiles);
        }
        claims.push_back(claim);
        if (step) {
            counters.push_back({step, at<const uint8_t>(ok, 0), 0});
        }
        for (Part& p : parts_at(workspace, pointers, k)) {
            p.theta = next<void>(pointers);
            p.lr_pointer = next<const float>(pointers);
            p.lr = static_cast<float>(next(numbers));
            p.decay = static_cast<float>(next(numbers));
            p.weight = static_cast<float>(1 - claim.beta);
            p.lead_weight = static_cast<float>(times == 2 ? 1 - claim.beta * claim.beta : 1 - claim.beta);
            p.momentum = momentum + p.offset;
            p.factor = kronecker(b) ? (A ? A + p.offset : nullptr) : q.P + p.offset;
            p.step_scale = at<const double>(workspace, scales) + k;
            p.ok = at<const uint8_t>(ok, 0);
            parts.push_back(p);
        }
        if (kronecker(b)) {
            products_of(workspace, k, q, A, at<float>(workspace, r.x), at<float>(workspace, r.y), r.ld,
                        at<Sums>(workspace, r.product_sums));
        }
    }
    all_used(pointers, numbers);
    prepare_all(parts, after, stream);
    run_products(stream);
    if (after) {
        measure_all(parts, stream);
    }
    ThetaVerdict verdict{};
    verdict.accounts = at<const Account>(workspace, accounts_);
    verdict.count = static_cast<int32_t>(blocks_.size());
    verdict.normalize = normalize, verdict.kappa = kappa;
    verdict.scales = at<double>(workspace, scales);
    verdict.norms = at<float>(norms, 0), verdict.wide_norms = at<double>(wide_norms, 0);
    verdict.ok = at<uint8_t>(ok, 0);
    decide_theta(claims, verdict, stream);
    update_all(parts, after, stream);
    count_all(counters, stream);
}

void Plan::qv(Stream stream, int64_t workspace, Pointers pointers) {
    const OnDevice guard(device_);
    std::vector<Part> parts;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::outside) {
            continue;
        }
        const Operator q = operator_at(pointers, k);
        const float* const A = next<const float>(pointers);
        float* const out = next<float>(pointers);
        require(b, out, "Q u");
        for (Part& p : parts_at(workspace, pointers, k)) {
            p.factor = kronecker(b) ? (A ? A + p.offset : nullptr) : q.P + p.offset;
            p.grad = out + p.offset;
            parts.push_back(p);
        }
        if (kronecker(b)) {
            products_of(workspace, k, q, A, at<float>(workspace, rooms_[k].x), out, b.n, nullptr);
        }
    }
    all_used(pointers, {});
    gather_all(parts, stream);
    run_products(stream);
}

}  // namespace fishleg::cuda
