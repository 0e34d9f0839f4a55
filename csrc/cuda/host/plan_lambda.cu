// The λ step, the products that depend on λ alone, and inner products.
#include <utility>

#include "cuda/device/auxiliary.h"
#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {

void Plan::aux_loss(Stream stream, int64_t workspace, Pointers pointers, double damping, bool learn_scale,
                    int64_t loss, int64_t alpha) {
    const OnDevice guard(device_);
    parts_.clear(), factors_.clear();
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        LambdaFactors f{};
        const bool diagonal = b.kind == Kind::diagonal;
        f.q = operator_at(pointers, k);
        for (AdamPointers* adam : {&f.R, &f.L}) {
            adam->value = next<float>(pointers);
            adam->exp_avg = next<float>(pointers);
            adam->exp_avg_sq = next<float>(pointers);
            if (adam == &f.R || !diagonal) {
                require(b, adam->value, "λ"), require(b, adam->exp_avg, "exp_avg");
                require(b, adam->exp_avg_sq, "exp_avg_sq");
            }
        }
        const float *const v = next<const float>(pointers), *const fv = next<const float>(pointers);
        require(b, v, "v"), require(b, fv, "F v");
        f.step = next<float>(pointers);
        factors_.push_back(f);
        for (Part& p : parts_at(workspace, pointers, k)) {
            p.factor = f.R.value + (diagonal ? p.offset : 0);
            p.v = v + p.offset, p.fv = fv + p.offset;
            p.grad = at<float>(workspace, offsets_[k].dL) + (diagonal ? p.offset : 0);
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

/// Products by precision, each kind after the one before it.
struct Plan::GradientProducts {
    std::vector<Product> preconditioned[2][4], sides[4], crosses[4], gradients[4];
    std::vector<Square> squares;
};

/// M = uᵀ(P w) and N = (w S)uᵀ; dL = (M+Mᵀ)L and dR = R(N+Nᵀ). ``precondition``: of P w S in w's place.
void Plan::add_block(GradientProducts& products, size_t k, int64_t workspace, const LambdaFactors& f,
                     bool precondition) const {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    const Operator& q = f.q;
    const auto matrix = [&](int64_t offset) { return at<float>(workspace, offset); };
    float *const x = matrix(offsets.x), *const t = matrix(offsets.t), *const M = matrix(offsets.M),
                *const N = matrix(offsets.N), *w = matrix(offsets.y), *other = matrix(offsets.t2);
    const int precision = static_cast<int>(b.precision);
    const int64_t m = b.m, n = b.n, ld = offsets.ld, ld_m = offsets.ld_m;
    if (precondition) {  // w ← P w S
        products.preconditioned[0][precision].push_back(product(q.P, q.ld_P, w, ld, t, ld, m, n, m));
        products.preconditioned[1][precision].push_back(product(t, ld, q.S, q.ld_S, other, ld, m, n, n));
        std::swap(w, other);
    }
    products.sides[precision].push_back(product(q.P, q.ld_P, w, ld, t, ld, m, n, m));
    products.sides[precision].push_back(product(w, ld, q.S, q.ld_S, other, ld, m, n, n));
    products.crosses[precision].push_back(product(x, ld, t, ld, M, ld, n, n, m, Layout::tn));
    products.crosses[precision].push_back(product(other, ld, x, ld, N, ld_m, m, m, n, Layout::nt));
    products.squares.push_back({M, static_cast<int32_t>(n), static_cast<int32_t>(ld), 0});
    products.squares.push_back({N, static_cast<int32_t>(m), static_cast<int32_t>(ld_m), 0});
    Product to_L = product(M, ld, f.L.value, n, matrix(offsets.dL), n, n, n, n);
    Product to_R = product(f.R.value, m, N, ld_m, matrix(offsets.dR), m, m, m, m);
    to_L.sums = at<Sums>(workspace, offsets.product_sums);
    to_R.sums = to_L.sums + tiles(to_L);
    products.gradients[precision].push_back(to_L);
    products.gradients[precision].push_back(to_R);
}

void Plan::aux_update(Stream stream, int64_t workspace, Numbers steps, double damping, bool precondition, double lr,
                      int64_t lr_pointer, double beta1, double beta2, double eps, int64_t ok) {
    const OnDevice guard(device_);
    for (Part& p : parts_) {
        p.sums = at<Sums>(workspace, sums_2_) + (p.sums - at<Sums>(workspace, sums_));
    }
    GradientProducts products;
    std::vector<AdamTensor> tensors;
    std::vector<Counter> counters;
    const LambdaFactors* next_factors = factors_.data();
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        const LambdaFactors& f = *next_factors++;
        const double step = next(steps);
        const auto learn = [&](const AdamPointers& adam, int64_t gradient, int64_t count) {
            tensors.push_back({adam.value, at<const float>(workspace, gradient), adam.exp_avg, adam.exp_avg_sq, f.step,
                               at<const float>(lr_pointer, 0), at<const uint8_t>(ok, 0), lr, beta1, beta2, eps, step,
                               count, 0});
        };
        if (f.step) {
            counters.push_back({f.step, at<const uint8_t>(ok, 0), 0});
        }
        if (b.kind == Kind::diagonal) {
            learn(f.R, offsets_[k].dL, b.m * b.n);
            continue;
        }
        add_block(products, k, workspace, f, precondition);
        learn(f.R, offsets_[k].dR, b.m * b.m);
        learn(f.L, offsets_[k].dL, b.n * b.n);
    }
    all_used({}, steps);
    residual_all(parts_, static_cast<float>(damping), precondition, stream);
    const auto run = [&](std::vector<Product>(&some)[4]) {
        for (int precision = 0; precision < 4; ++precision) {
            multiply_all(some[precision], static_cast<Precision>(precision), stream);
        }
    };
    run(products.preconditioned[0]), run(products.preconditioned[1]);
    run(products.sides), run(products.crosses);
    symmetrise_all(products.squares, stream);
    run(products.gradients);
    decide_aux({at<const Sums>(workspace, sums_2_), sums_2_count_, at<const AuxLoss>(workspace, aux_),
                at<uint8_t>(ok, 0)}, stream);
    adam_all(tensors, stream);
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
