// The λ step, the products that depend on λ alone, and inner products.
#include <algorithm>
#include <utility>

#include "cuda/device/auxiliary.h"
#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {

void Plan::aux_loss(Stream stream, int64_t workspace, const LambdaInputs& inputs, double damping, bool learn_scale,
                    int64_t loss, int64_t alpha) {
    const OnDevice guard(device_);
    check(inputs.gradients, inputs.operators);
    check(6 * covered_, inputs.adam.size(), "pointers of λ"), check(covered_, inputs.steps.size(), "counters");
    check(covered_, inputs.v.size(), "v"), check(covered_, inputs.fv.size(), "F v");
    factors_.clear();
    Sums* sums = at<Sums>(workspace, sums_);
    for (size_t k = 0, place = 0, i = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        const bool diagonal = b.kind == Kind::diagonal;
        const auto adam = [&](size_t first) {
            const auto pointer = [&](size_t j) { return at<float>(inputs.adam[6 * place + first + j], 0); };
            const AdamPointers found{pointer(0), pointer(1), pointer(2)};
            if (first == 0 || !diagonal) {
                require(b, found.value, "λ"), require(b, found.exp_avg, "exp_avg");
                require(b, found.exp_avg_sq, "exp_avg_sq");
            }
            return found;
        };
        const float *const v = at<const float>(inputs.v[place], 0), *const fv = at<const float>(inputs.fv[place], 0);
        require(b, v, "v"), require(b, fv, "F v");
        const LambdaFactors f{operator_at(inputs.operators, place, k), adam(0), adam(3),
                              at<float>(inputs.steps[place], 0)};
        ++place;
        for (; i < places_.size() && places_[i].block == static_cast<int32_t>(k); ++i) {
            AuxPart& p = aux_parts_.items[i];
            const int64_t offset = places_[i].offset;
            point(p, i, workspace, sums, inputs.gradients);
            p.factor = f.R.value + (diagonal ? offset : 0);
            p.v = v + offset, p.fv = fv + offset;
            p.grad = at<float>(workspace, offsets_[k].dL) + (diagonal ? offset : 0);
            p.aux = at<const AuxLoss>(workspace, aux_);
            p.damping = static_cast<float>(damping);
        }
        factors_.push_back(f);
    }
    aux_dots_all(aux_parts_, stream);
    AuxLossJob job{};
    job.sums = at<const Sums>(workspace, sums_), job.count = sums_count_;
    job.damping = damping, job.learn_scale = learn_scale;
    job.out = at<AuxLoss>(workspace, aux_), job.loss = at<float>(loss, 0), job.alpha = at<float>(alpha, 0);
    cuda::aux_loss(job, stream);
}

/// M + Mᵀ with M = uᵀ(P w), and N + Nᵀ with N = (w S)uᵀ; dL = (M+Mᵀ)L and dR = R(N+Nᵀ). ``precondition``: of P w S in
/// w's place.
void Plan::add_products(size_t k, int64_t workspace, const LambdaFactors& f, bool precondition) {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    const Operator& q = f.q;
    const auto matrix = [&](int64_t offset) { return at<float>(workspace, offset); };
    const auto add = [&](Stage stage, const Product& p) {
        products_[stage][static_cast<int>(b.precision)].push_back(p);
    };
    float *const x = matrix(offsets.x), *const t = matrix(offsets.t), *const M = matrix(offsets.M),
                *const N = matrix(offsets.N), *w = matrix(offsets.y), *other = matrix(offsets.t2);
    const int64_t m = b.m, n = b.n, ld = offsets.ld, ld_m = offsets.ld_m;
    if (precondition) {  // w ← P w S
        add(precondition_left, product(q.P, q.ld_P, w, ld, t, ld, m, n, m));
        add(precondition_right, product(t, ld, q.S, q.ld_S, other, ld, m, n, n));
        std::swap(w, other);
    }
    add(sides, product(q.P, q.ld_P, w, ld, t, ld, m, n, m));
    add(sides, product(w, ld, q.S, q.ld_S, other, ld, m, n, n));
    for (Product p : {product(x, ld, t, ld, M, ld, n, n, m, Layout::tn),
                      product(other, ld, x, ld, N, ld_m, m, m, n, Layout::nt)}) {
        p.symmetric = p.plus_transpose = 1;
        add(crosses, p);
    }
    Product to_L = product(M, ld, f.L.value, n, matrix(offsets.dL), n, n, n, n);
    Product to_R = product(f.R.value, m, N, ld_m, matrix(offsets.dR), m, m, m, m);
    to_L.sums = at<Sums>(workspace, offsets.product_sums);
    to_R.sums = to_L.sums + tiles(to_L);
    add(gradients, to_L), add(gradients, to_R);
}

void Plan::aux_update(Stream stream, int64_t workspace, Numbers steps, bool precondition, double lr,
                      int64_t lr_pointer, double beta1, double beta2, double eps, int64_t ok) {
    const OnDevice guard(device_);
    check(factors_.size(), steps.size(), "steps");
    Sums* sums = at<Sums>(workspace, sums_2_);
    for (size_t i = 0; i < places_.size(); ++i) {
        aux_parts_.items[i].sums = sums;
        sums += places_[i].tiles;
    }
    tensors_.clear(), counters_.clear();
    for (size_t k = 0, place = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (b.kind == Kind::uncovered) {
            continue;
        }
        const double step = steps[place];
        const LambdaFactors& f = factors_[place++];
        const auto learn = [&](const AdamPointers& adam, int64_t gradient, int64_t count) {
            tensors_.push_back({adam.value, at<const float>(workspace, gradient), adam.exp_avg, adam.exp_avg_sq,
                                f.step, at<const float>(lr_pointer, 0), at<const uint8_t>(ok, 0), lr, beta1, beta2,
                                eps, step, count, 0});
        };
        if (f.step) {
            counters_.push_back({f.step, at<const uint8_t>(ok, 0), 0});
        }
        if (b.kind == Kind::diagonal) {
            learn(f.R, offsets_[k].dL, b.m * b.n);
            continue;
        }
        add_products(k, workspace, f, precondition);
        learn(f.R, offsets_[k].dR, b.m * b.m);
        learn(f.L, offsets_[k].dL, b.n * b.n);
    }
    residual_all(aux_parts_, precondition, stream);
    for (auto& stage : products_) {
        for (int precision = 0; precision < 4; ++precision) {
            multiply_all(stage[precision], static_cast<Precision>(precision), stream);
            stage[precision].clear();
        }
    }
    decide_aux({at<const Sums>(workspace, sums_2_), sums_2_count_, at<const AuxLoss>(workspace, aux_),
                at<uint8_t>(ok, 0)}, stream);
    adam_all(tensors_, stream);
    count_all(counters_, stream);
}

void Plan::refresh(Stream stream, Pointers pointers) {
    const OnDevice guard(device_);
    check(6 * std::count_if(blocks_.begin(), blocks_.end(), kronecker), pointers.size(), "pointers");
    for (const BlockLayout& b : blocks_) {
        if (!kronecker(b)) {
            continue;
        }
        const auto matrix = [&](size_t i) { return reinterpret_cast<float*>(pointers[i]); };
        float *const R = matrix(0), *const L = matrix(1), *const P = matrix(2), *const S = matrix(4);
        require(b, R, "R"), require(b, L, "L"), require(b, P, "P"), require(b, S, "S");
        for (Product p : {product(R, b.m, R, b.m, P, pointers[3], b.m, b.m, b.m, Layout::tn),
                          product(L, b.n, L, b.n, S, pointers[5], b.n, b.n, b.n, Layout::nt)}) {
            p.symmetric = 1;
            first_[static_cast<int>(b.precision)].push_back(p);
        }
        pointers = pointers.subspan(6);
    }
    run_products(stream);
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
