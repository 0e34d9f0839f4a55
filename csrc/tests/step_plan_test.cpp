// The θ step, Adam and inner products on a CPU against loops over single elements in double.
#include "cpu/step/step_plan.h"

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "check.h"
#include "cpu/gemm/products.h"
#include "cpu/step/adam.h"
#include "cpu/step/inner.h"
#include "formulas.h"

using namespace fishleg;
using namespace fishleg::cpu;

namespace {

std::mt19937 generator(0);

std::vector<float> random_numbers(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& x : values) x = normal(generator);
    return values;
}

/// A layer of m outputs and k inputs with a bias, all memory included; its weight (m, k) may be stored transposed.
struct Layer {
    int64_t m, k;
    bool transposed;
    std::vector<float> weight, bias, weight_grad, bias_grad, momentum, given, product, d;
    float step = 3;

    Layer(int64_t m_, int64_t k_, bool transposed_ = false) : m(m_), k(k_), transposed(transposed_) {
        weight = random_numbers(m * k), weight_grad = random_numbers(m * k);
        bias = random_numbers(m), bias_grad = random_numbers(m);
        momentum = random_numbers(m * (k + 1)), given = random_numbers(m * (k + 1));
        product = random_numbers(m * (k + 1)), d = random_numbers(m * (k + 1));
    }

    size_t at(int64_t i, int64_t j) const { return transposed ? j * m + i : i * k + j; }
    float& theta(int64_t i, int64_t j) { return j == k ? bias[i] : weight[at(i, j)]; }
    float grad(int64_t i, int64_t j) const { return j == k ? bias_grad[i] : weight_grad[at(i, j)]; }

    Block block(Source source) {
        Block b;
        b.name = "layer";
        b.rows = m, b.columns = k + 1;
        const int64_t rows = transposed ? 1 : k, columns = transposed ? m : 1;
        Part w, c;
        w.width = k, w.param = {weight.data(), rows, columns, Dtype::float32};
        w.grad = {weight_grad.data(), rows, columns, Dtype::float32};
        c.first = k, c.width = 1, c.param = {bias.data(), 1, 1, Dtype::float32};
        c.grad = {bias_grad.data(), 1, 1, Dtype::float32};
        w.lr = c.lr = 0.1, w.weight_decay = 0.01;
        b.parts = {w, c};
        b.momentum = momentum.data(), b.step = &step, b.diagonal = d.data();
        b.source = source, b.given = given.data(), b.product = product.data();
        b.beta = 0.9, b.base_lr = 0.1;
        return b;
    }
};

struct Wanted {
    std::vector<double> theta, momentum, product;
    double norm;
};

/// What one step should come to, from the layer as it is.
Wanted wanted(Layer layer, Source source, int times, Normalize normalize, double kappa) {
    const double beta = 0.9, kept = std::pow(beta, times);
    const bool after = source == Source::after || source == Source::after_diagonal;
    const double corrected = 1 - std::pow(beta, layer.step + times);
    Wanted result;
    std::vector<double> nats;
    double square = 0, power = 0;
    for (int64_t i = 0; i < layer.m; ++i) {
        for (int64_t j = 0; j <= layer.k; ++j) {
            const int64_t e = i * (layer.k + 1) + j;
            const double m = layer.momentum[e], g = layer.grad(i, j), given = layer.given[e], d = layer.d[e];
            const double averaged = kept * m + (1 - kept) * g;
            double x = g, nat = 0, product = layer.product[e];
            switch (source) {
                case Source::product: nat = given; break;
                case Source::low_rank:
                    product = beta * product + (1 - beta) * given;
                    nat = times == 2 ? beta * product + (1 - beta) * given : product;
                    break;
                case Source::diagonal: nat = d * d * averaged; break;
                case Source::after: x = given, nat = kept * m + (1 - kept) * x; break;
                default: x = d * d * g, nat = kept * m + (1 - kept) * x;
            }
            nats.push_back(nat);
            square += nat * nat;
            power += nat * (after ? g : averaged);
            result.momentum.push_back(beta * m + (1 - beta) * x);
            result.product.push_back(product);
        }
    }
    result.norm = std::sqrt(square) / corrected;
    double c = 1;
    if (normalize == Normalize::rms) c = 0.2 * std::sqrt(static_cast<double>(nats.size())) / result.norm;
    if (normalize == Normalize::trust)
        c = std::fmin(1, std::sqrt(kappa / (0.01 * power / (after ? corrected : corrected * corrected))));
    size_t e = 0;
    for (int64_t i = 0; i < layer.m; ++i)
        for (int64_t j = 0; j <= layer.k; ++j, ++e) {
            const double theta = layer.theta(i, j), decay = j == layer.k ? 0 : 0.01;
            result.theta.push_back(theta - 0.1 * (c * nats[e] / corrected + decay * theta));
        }
    return result;
}

bool close(double a, double b) { return std::fabs(a - b) <= 2e-5 * (1 + std::fabs(b)); }

void one_step(int64_t m, int64_t k, Source source, int times, Normalize normalize, bool transposed) {
    Layer layer(m, k, transposed);
    double kappa = 1e-4;
    const Wanted want = wanted(layer, source, times, normalize, kappa);
    StepPlan plan({layer.block(source)});
    double norm = -1;
    CHECK(plan.theta_step({times, normalize, kappa, 2}, &norm));
    CHECK(close(norm, want.norm));
    CHECK(layer.step == 4);
    size_t e = 0;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j <= k; ++j, ++e) {
            CHECK(close(layer.theta(i, j), want.theta[e]));
            CHECK(close(layer.momentum[e], want.momentum[e]));
            CHECK(close(layer.product[e], want.product[e]));
        }
}

void all_steps() {
    for (auto [m, k] : {std::pair<int64_t, int64_t>{1, 1}, {3, 62}, {63, 257}})
        for (int source = 0; source < 5; ++source)
            for (int times : {1, 2})
                for (Normalize normalize : {Normalize::none, Normalize::rms, Normalize::trust})
                    for (bool transposed : {false, true})
                        one_step(m, k, static_cast<Source>(source), times, normalize, transposed);
}

void average() {
    Layer layer(5, 700, true);
    StepPlan plan({layer.block(Source::product)});
    std::vector<float> out(layer.momentum.size(), NAN);
    plan.average({out.data()}, {2});
    size_t e = 0;
    for (int64_t i = 0; i < layer.m; ++i)
        for (int64_t j = 0; j <= layer.k; ++j, ++e)
            CHECK(close(out[e], 0.81 * layer.momentum[e] + 0.19 * layer.grad(i, j)));
    CHECK_THROWS(plan.average({}, {1}), "one place a block, 1, but has: 0");
}

void zero_gradients() {
    for (bool looked : {false, true}) {  // found by average(), or by the step itself
        Layer layer(4, 6);
        layer.weight_grad.assign(24, 0), layer.bias_grad.assign(4, 0);
        const auto weight = layer.weight;
        Block block = layer.block(Source::product);
        for (Part& part : block.parts) part.weight_decay = 0;
        StepPlan plan({block});
        std::vector<float> out(28);
        if (looked) plan.average({out.data()}, {1});
        double norm;
        CHECK(plan.theta_step({1, Normalize::rms, 0, 1}, &norm) && norm > 0);
        CHECK(layer.weight == weight);  // c is 0
    }
}

void nothing_is_written() {
    for (Source source : {Source::product, Source::low_rank, Source::diagonal}) {
        Layer good(8, 20), bad(40, 900);
        (source == Source::diagonal ? bad.weight_grad : bad.given)[17] = std::numeric_limits<float>::infinity();
        const Layer good_before = good, bad_before = bad;
        StepPlan plan({good.block(source), bad.block(source)});
        double norms[2];
        CHECK(!plan.theta_step({2, Normalize::rms, 0, 2}, norms));
        CHECK(good.weight == good_before.weight && good.bias == good_before.bias && good.step == 3);
        CHECK(good.momentum == good_before.momentum && good.product == good_before.product);
        CHECK(bad.weight == bad_before.weight && bad.momentum == bad_before.momentum);
    }
}

void missing_gradient() {
    Layer layer(6, 9);
    const Layer before = layer;
    Block block = layer.block(Source::product);
    block.parts[0].grad = {}, block.parts[0].moves = false, block.parts[0].param = {};
    StepPlan plan({block});
    double norm;
    CHECK(plan.theta_step({1, Normalize::rms, 0, 1}, &norm));
    CHECK(layer.weight == before.weight && layer.bias != before.bias);
    for (int64_t i = 0; i < 6; ++i) CHECK(close(layer.momentum[i * 10], 0.9 * before.momentum[i * 10]));
}

void sixteen_bits() {
    Layer layer(7, 600);
    std::vector<BFloat16> weight(layer.weight.size()), grad(layer.weight.size());
    for (size_t e = 0; e < weight.size(); ++e) {
        narrow(layer.weight[e], weight[e]), narrow(layer.weight_grad[e], grad[e]);
        layer.weight[e] = widen(weight[e]), layer.weight_grad[e] = widen(grad[e]);
    }
    const Wanted want = wanted(layer, Source::diagonal, 2, Normalize::rms, 0);
    Block block = layer.block(Source::diagonal);
    block.parts[0].param = {weight.data(), 600, 1, Dtype::bfloat16};
    block.parts[0].grad = {grad.data(), 600, 1, Dtype::bfloat16};
    StepPlan plan({block});
    double norm;
    CHECK(plan.theta_step({2, Normalize::rms, 0, 2}, &norm));
    for (int64_t i = 0; i < 7; ++i)
        for (int64_t j = 0; j < 600; ++j)
            CHECK(std::fabs(widen(weight[i * 600 + j]) - want.theta[i * 601 + j]) <=
                  std::fabs(want.theta[i * 601 + j]) / 256 + 1e-6);
}

void any_number_of_threads() {
    Layer first(300, 500), second(300, 500);
    second = first;
    double norms[2];
    CHECK(StepPlan({first.block(Source::low_rank)}).theta_step({2, Normalize::rms, 0, 1}, norms));
    CHECK(StepPlan({second.block(Source::low_rank)}).theta_step({2, Normalize::rms, 0, 3}, norms + 1));
    CHECK(norms[0] == norms[1] && first.weight == second.weight && first.momentum == second.momentum);
    const std::vector<Pair> pairs = {{first.weight.data(), first.weight_grad.data(), 150000, Dtype::float32}};
    double want = 0;
    for (int e = 0; e < 150000; ++e) want += static_cast<double>(first.weight[e]) * first.weight_grad[e];
    CHECK(inner(pairs, 1) == inner(pairs, 3) && std::fabs(inner(pairs, 1) - want) < 1e-2);
}

/// Q g as packed factors, of which one or both passes make it, is what it is as a matrix.
void packed_factors_of_a_low_rank_gradient() {
    for (const Engine* engine : engines()) {
        const int64_t m = 70, k = 2100, depth = 5;  // several tasks, none of them whole panels
        Layer layer(m, k);
        const auto e = random_numbers(depth * m), h = random_numbers(depth * (k + 1));
        std::vector<char> left(packed_size(*engine, m, depth)), right(packed_size(*engine, k + 1, depth));
        pack(*engine, {{Side::left, {e.data(), m, depth, 1, m}, left.data()},
                       {Side::right, {h.data(), k + 1, depth, 1, k + 1}, right.data()}}, 1);
        multiply(*engine, {{left.data(), right.data(), m, k + 1, depth, Target::matrix, layer.given.data(), k + 1}}, 1);
        Layer anew = layer, once = layer;
        std::vector<float> scratch(m * (k + 1), NAN);
        double norms[3];
        CHECK(StepPlan({layer.block(Source::low_rank)}).theta_step({2, Normalize::rms, 0, 2}, norms));
        Layer* layers[] = {&anew, &once};
        for (int l = 0; l < 2; ++l) {
            Block block = layers[l]->block(Source::low_rank);
            block.given = nullptr, block.factors = {left.data(), right.data(), depth};
            block.scratch = l ? scratch.data() : nullptr;
            StepPlan plan({block});
            double norm;
            CHECK_THROWS(plan.theta_step({}, &norm), "nothing multiplies its packed factors");
            plan.use(*engine);
            CHECK(plan.theta_step({2, Normalize::rms, 0, 2}, norms + 1 + l));
            CHECK(norms[1 + l] == norms[0] && layers[l]->weight == layer.weight && layers[l]->product == layer.product);
        }
    }
}

void empty() {
    StepPlan plan({});
    CHECK(plan.theta_step({}, nullptr));
    Block none;
    none.columns = 0, none.rows = 5;
    double norm = -1;
    CHECK(StepPlan({none}).theta_step({}, &norm) && norm == 0);
    CHECK(adam_step({}, {0.1, 0.9, 0.999, 1e-8, 2}) && inner({}, 2) == 0);
}

void refusals() {
    Layer layer(3, 4);
    Block block = layer.block(Source::product);
    const auto changed = [&](auto change) {
        Block other = block;
        change(other);
        return std::vector<Block>{other};
    };
    CHECK_THROWS(StepPlan(changed([](Block& b) { b.rows = -1; })), "block 'layer'");
    CHECK_THROWS(StepPlan(changed([](Block& b) { b.columns = 7; })), "fill 7 columns but fill: 5");
    CHECK_THROWS(StepPlan(changed([](Block& b) { b.parts[1].first = 3; })), "starts at column 3 where 4");
    CHECK_THROWS(StepPlan(changed([](Block& b) { b.dtype = Dtype::float16; })), "λ should be float32 or float64");
    double norm;
    const auto step = [&](auto change) { StepPlan(changed(change)).theta_step({}, &norm); };
    CHECK_THROWS(step([](Block& b) { b.given = nullptr; }), "block 'layer'");
    CHECK_THROWS(step([](Block& b) { b.momentum = nullptr; }), "no momentum");
    CHECK_THROWS(step([](Block& b) { b.source = Source::low_rank, b.product = nullptr; }), "Q m");
    CHECK_THROWS(step([](Block& b) { b.parts[1].param = {}; }), "no memory");
    CHECK_THROWS(adam_step({{"R", 3}}, {0.1, 0.9, 0.999, 1e-8, 1}), "'R'");
}

void adam_of_tensors() {
    auto value = random_numbers(70001), grad = random_numbers(70001);
    std::vector<float> m(value.size(), 0.1f), v(value.size(), 0.2f);
    const auto before = value;
    AdamTensor tensor{"R", 70001, value.data(), m.data(), v.data(), grad.data(), Dtype::float32, Dtype::float32, 4};
    CHECK(adam_step({tensor}, {0.01, 0.9, 0.999, 1e-8, 2}));
    for (size_t e = 0; e < value.size(); ++e) {
        const double g = grad[e], wm = 0.9 * 0.1f + 0.1 * g, wv = 0.999 * 0.2f + 0.001 * g * g;
        const double want = before[e] - 0.01 * wm / (1 - std::pow(0.9, 4)) /
                                            (std::sqrt(wv / (1 - std::pow(0.999, 4))) + 1e-8);
        CHECK(close(value[e], want) && close(m[e], wm) && close(v[e], wv));
    }
    const auto after = value;
    grad[69999] = NAN;
    CHECK(!adam_step({tensor}, {0.01, 0.9, 0.999, 1e-8, 2}) && value == after);
}

}  // namespace

int main() {
    std::printf("instruction set: %s\n", kernels(Dtype::float32).name);
    all_steps();
    average();
    zero_gradients();
    nothing_is_written();
    missing_gradient();
    sixteen_bits();
    any_number_of_threads();
    packed_factors_of_a_low_rank_gradient();
    empty();
    refusals();
    adam_of_tensors();
    return check::failures() ? 1 : 0;
}
