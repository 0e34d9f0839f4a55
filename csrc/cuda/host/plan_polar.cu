// The polar factors of a θ step: products of matrices alone.
#include <algorithm>
#include <utility>

#include "cuda/device/products.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {
namespace {

void set(Product& p, float times, float add_times) { p.times = times, p.add_times = add_times; }

/// X ← aX + (bA + cA²)X for all of them, and the next step's X where this one's was not.
void run(PolarStep& step, const double* coefficients, bool first, Precision precision, Stream stream) {
    const float a = static_cast<float>(coefficients[0]), b = static_cast<float>(coefficients[1]),
                c = static_cast<float>(coefficients[2]);
    for (Product& p : step.square) {
        p.add = first ? nullptr : p.operands[0].data;
        p.sums = first ? p.sums : nullptr;
        p.arrivals = first ? p.arrivals : nullptr;
        set(p, c, b);
    }
    for (size_t i = 0; i < step.apply.size(); ++i) {
        step.apply[i].add_scale = first ? step.first[i].scale : nullptr;
        set(step.apply[i], 1, a);
        step.first[i].linear = b, step.first[i].quadratic = c;
    }
    multiply_all(step.gram, precision, stream);
    multiply_all(step.square, precision, stream);
    if (first) {
        first_step_all(step.first, stream);
    }
    multiply_all(step.apply, precision, stream);
    for (size_t i = 0; i < step.apply.size(); ++i) {
        Product &gram = step.gram[i], &apply = step.apply[i];
        float* const next = apply.C;
        apply.C = const_cast<float*>(apply.add);
        apply.operands[apply.operands[0].data != apply.add].data = next;
        apply.add = gram.operands[0].data = gram.operands[1].data = next;
    }
}

}  // namespace

/// From nat/‖nat‖, in ``polar`` of each block that is flat, to the polar factor.
void Plan::polar_factors(Stream stream, int64_t workspace, Numbers coefficients) {
    if (coefficients.empty()) {
        return;
    }
    for (PolarStep& step : polar_steps_) {
        step.gram.clear(), step.square.clear(), step.apply.clear(), step.first.clear();
    }
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        if (!b.flat) {
            continue;
        }
        const BlockOffsets& offsets = offsets_[k];
        const bool tall = b.m > b.n;
        const int64_t shorter = std::min(b.m, b.n), longer = std::max(b.m, b.n), ld = offsets.ld,
                      ld_A = padded(shorter);
        float *const X = at<float>(workspace, offsets.polar), *const next = at<float>(workspace, offsets.turn);
        float *const A = at<float>(workspace, offsets.polar_A), *const B = at<float>(workspace, offsets.polar_B);
        PolarStep& step = polar_steps_[static_cast<int>(b.precision)];
        Product gram = product(X, ld, X, ld, A, ld_A, shorter, shorter, longer, tall ? Layout::tn : Layout::nt);
        Product square = product(A, ld_A, A, ld_A, B, ld_A, shorter, shorter, shorter);
        gram.symmetric = square.symmetric = 1;
        square.sums = at<Sums>(workspace, offsets.polar_sums);
        square.arrivals = gram.clear = at<int32_t>(workspace, offsets.polar_arrivals);
        square.norm = at<double>(workspace, offsets.polar_norm);
        Product apply = tall ? product(X, ld, B, ld_A, next, ld, b.m, b.n, shorter)
                             : product(B, ld_A, X, ld, next, ld, b.m, b.n, shorter);
        apply.add = X;
        FirstStep first{};
        first.A = A, first.B = B, first.norm = square.norm, first.scale = at<float>(workspace, offsets.polar_scale);
        first.n = static_cast<int32_t>(shorter), first.ld = static_cast<int32_t>(ld_A);
        step.gram.push_back(gram), step.square.push_back(square), step.apply.push_back(apply);
        step.first.push_back(first);
    }
    for (size_t i = 0; i < coefficients.size(); i += 3) {
        for (int precision = 0; precision < 4; ++precision) {
            run(polar_steps_[precision], coefficients.data() + i, i == 0, static_cast<Precision>(precision), stream);
        }
    }
}

}  // namespace fishleg::cuda
