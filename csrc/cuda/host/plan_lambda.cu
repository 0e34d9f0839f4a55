// The λ step, the products that depend on λ alone, and inner products.
#include <utility>

#include "cuda/device/auxiliary.h"
#include "cuda/host/plan_parts.h"
#include "cuda/device/products.h"
#include "cuda/device/theta.h"

namespace fishleg::cuda {

void Plan::aux_loss(Stream stream, int64_t workspace, Pointers pointers, double damping, bool learn_scale,
                    int64_t loss, int64_t alpha) {
    const OnDevice guard(device_);
    parts_.clear(), factors_.clear();
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::outside) {
            continue;
        }
        Factors f{};
        const bool diagonal = b.kind == Kind::diagonal;
        f.q = operator_at(pointers, k);
        for (auto* moments : {&f.R, &f.L}) {
            moments->value = next<float>(pointers);
            moments->exp_avg = next<float>(pointers);
            moments->exp_avg_sq = next<float>(pointers);
            if (moments == &f.R || !diagonal) {
                require(b, moments->value, "λ"), require(b, moments->exp_avg, "exp_avg");
                require(b, moments->exp_avg_sq, "exp_avg_sq");
            }
        }
        const float *const v = next<const float>(pointers), *const fv = next<const float>(pointers);
        require(b, v, "v"), require(b, fv, "F v");
        f.step = next<float>(pointers);
        factors_.push_back(f);
        for (Part& p : parts_at(workspace, pointers, k)) {
            p.factor = f.R.value + (diagonal ? p.offset : 0);
            p.v = v + p.offset, p.fv = fv + p.offset;
            p.grad = at<float>(workspace, rooms_[k].dL) + (diagonal ? p.offset : 0);
            p.aux = at<const AuxLoss>(workspace, aux_);
            parts_.push_back(p);
        }
    }
    all_used(pointers, {});
    aux_dots_all(parts_, stream);
    AuxLossJob job{};
    job.sums = at<const Sums>(workspace, sums_), job.count = sums_count_;
    job.damping = damping, job.learn_scale = learn_scale;
    job.out = at<AuxLoss>(workspace, aux_), job.loss = at<float>(loss, 0), job.alpha = at<float>(alpha, 0);
    cuda::aux_loss(job, stream);
}

void Plan::aux_update(Stream stream, int64_t workspace, Numbers steps, double damping, bool precondition, double lr,
                      int64_t lr_pointer, double beta1, double beta2, double eps, int64_t ok) {
    const OnDevice guard(device_);
    for (Part& p : parts_) {
        p.sums = at<Sums>(workspace, sums_2_) + (p.sums - at<Sums>(workspace, sums_));
    }
    std::vector<Product> weigh[2][4], sides[4], crosses[4], gradients[4];
    std::vector<Square> squares;
    std::vector<Lambda> lambdas;
    std::vector<Counter> counters;
    const Factors* next_factors = factors_.data();
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::outside) {
            continue;
        }
        const Room& r = rooms_[k];
        const Factors& f = *next_factors++;
        const double step = next(steps);
        const auto learn = [&](const Moments& moments, const float* grad, int64_t count) {
            lambdas.push_back({moments.value, grad, moments.exp_avg, moments.exp_avg_sq, f.step,
                               at<const float>(lr_pointer, 0), at<const uint8_t>(ok, 0), lr, beta1, beta2, eps, step,
                               count, 0});
        };
        if (f.step) {
            counters.push_back({f.step, at<const uint8_t>(ok, 0), 0});
        }
        float* const dL = at<float>(workspace, r.dL);
        if (b.kind == Kind::diagonal) {
            learn(f.R, dL, b.m * b.n);
            continue;
        }
        float *const x = at<float>(workspace, r.x), *const t = at<float>(workspace, r.t), *w = at<float>(workspace, r.y),
                    *other = at<float>(workspace, r.t2), *const dR = at<float>(workspace, r.dR),
                    *const M = at<float>(workspace, r.M), *const N = at<float>(workspace, r.N);
        const int precision = static_cast<int>(b.precision);
        if (precondition) {  // w ← P w S
            weigh[0][precision].push_back(product(f.q.P, f.q.ld_P, w, r.ld, t, r.ld, b.m, b.n, b.m));
            weigh[1][precision].push_back(product(t, r.ld, f.q.S, f.q.ld_S, other, r.ld, b.m, b.n, b.n));
            std::swap(w, other);
        }
        // M = uᵀ(P w) and N = (w S)uᵀ; dL = (M+Mᵀ)L and dR = R(N+Nᵀ)
        sides[precision].push_back(product(f.q.P, f.q.ld_P, w, r.ld, t, r.ld, b.m, b.n, b.m));
        sides[precision].push_back(product(w, r.ld, f.q.S, f.q.ld_S, other, r.ld, b.m, b.n, b.n));
        crosses[precision].push_back(product(x, r.ld, t, r.ld, M, r.ld, b.n, b.n, b.m, Layout::tn));
        crosses[precision].push_back(product(other, r.ld, x, r.ld, N, r.ld_m, b.m, b.m, b.n, Layout::nt));
        squares.push_back({M, static_cast<int32_t>(b.n), static_cast<int32_t>(r.ld), 0});
        squares.push_back({N, static_cast<int32_t>(b.m), static_cast<int32_t>(r.ld_m), 0});
        Product to_L = product(M, r.ld, f.L.value, b.n, dL, b.n, b.n, b.n, b.n);
        Product to_R = product(f.R.value, b.m, N, r.ld_m, dR, b.m, b.m, b.m, b.m);
        to_L.sums = at<Sums>(workspace, r.product_sums);
        to_R.sums = to_L.sums + tiles(to_L);
        gradients[precision].push_back(to_L);
        gradients[precision].push_back(to_R);
        learn(f.R, dR, b.m * b.m);
        learn(f.L, dL, b.n * b.n);
    }
    all_used({}, steps);
    residual_all(parts_, static_cast<float>(damping), precondition, stream);
    const auto run = [&](std::vector<Product>(&products)[4]) {
        for (int precision = 0; precision < 4; ++precision) {
            multiply_all(products[precision], static_cast<Precision>(precision), stream);
        }
    };
    run(weigh[0]), run(weigh[1]);
    run(sides), run(crosses);
    symmetrise_all(squares, stream);
    run(gradients);
    decide_aux({at<const Sums>(workspace, sums_2_), sums_2_count_, at<const AuxLoss>(workspace, aux_),
                at<uint8_t>(ok, 0)}, stream);
    adam_all(lambdas, stream);
    count_all(counters, stream);
}

void Plan::refresh(Stream stream, Pointers pointers) {
    const OnDevice guard(device_);
    std::vector<Product> products[4];
    for (const BlockLayout& b : blocks_) {
        if (!kronecker(b)) {
            continue;
        }
        const float *const R = next<const float>(pointers), *const L = next<const float>(pointers);
        float* const P = next<float>(pointers);
        const int64_t ld_P = next_number(pointers);
        float* const S = next<float>(pointers);
        const int64_t ld_S = next_number(pointers);
        require(b, R, "R"), require(b, L, "L"), require(b, P, "P"), require(b, S, "S");
        for (Product p : {product(R, b.m, R, b.m, P, ld_P, b.m, b.m, b.m, Layout::tn),
                          product(L, b.n, L, b.n, S, ld_S, b.n, b.n, b.n, Layout::nt)}) {
            p.symmetric = 1;
            products[static_cast<int>(b.precision)].push_back(p);
        }
    }
    all_used(pointers, {});
    for (int precision = 0; precision < 4; ++precision) {
        multiply_all(products[precision], static_cast<Precision>(precision), stream);
    }
}

void inner(int device, Stream stream, Pointers pointers, Pointers counts, Pointers types, int64_t sums, int64_t more,
           int64_t out) {
    const OnDevice guard(device);
    if (pointers.size() != 2 * counts.size() || types.size() != pointers.size()) {
        throw std::invalid_argument("two pointers and two types are needed for each count");
    }
    std::vector<Pair> pairs;
    for (size_t i = 0; i < counts.size(); ++i) {
        Pair p{};
        p.x = reinterpret_cast<const void*>(pointers[2 * i]), p.y = reinterpret_cast<const void*>(pointers[2 * i + 1]);
        p.x_type = static_cast<Type>(types[2 * i]), p.y_type = static_cast<Type>(types[2 * i + 1]);
        p.count = counts[i];
        pairs.push_back(p);
    }
    inner_all(pairs, at<Sums>(sums, 0), more, at<float>(out, 0), stream);
}

}  // namespace fishleg::cuda
