// Runs every kernel of the CUDA plan on the CPU with buffers of exactly the size they need, for AddressSanitizer and
// UndefinedBehaviorSanitizer; products are compared with loops in double. Exits with 1 where something is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "cuda/host/plan.h"

using namespace fishleg::cuda;

namespace {

int failures = 0;

void expect(bool right, const char* what, const std::string& name) {
    if (!right) {
        std::printf("%s: %s\n", name.c_str(), what);
        ++failures;
    }
}

/// Buffers that live until the end, each an allocation of its own.
class Memory {
public:
    float* floats(int64_t count, bool random = true) {
        kept_.emplace_back(new char[count * sizeof(float)]);
        float* const start = reinterpret_cast<float*>(kept_.back().get());
        for (int64_t i = 0; i < count; ++i) {
            start[i] = random ? normal_(engine_) : 0;
        }
        return start;
    }
    char* bytes(int64_t count) {
        kept_.emplace_back(new char[count]);
        std::fill_n(kept_.back().get(), count, char(0xff));
        return kept_.back().get();
    }

private:
    std::vector<std::unique_ptr<char[]>> kept_;
    std::mt19937 engine_{0};
    std::normal_distribution<float> normal_;
};

int64_t number(const void* pointer) { return reinterpret_cast<int64_t>(pointer); }

struct Layer {
    BlockLayout layout;
    float *R, *L, *P, *S, *A, *momentum, *v, *fv, *out, *step, *aux_step;
    std::vector<float*> moments, thetas, gs;
};

/// A layer (m, n − bias) with its bias, transposed where ``transposed``; or a Diagonal.
Layer layer(Memory& memory, Kind kind, Precision precision, int64_t m, int64_t n, bool bias, bool transposed) {
    Layer l{};
    l.layout = {std::to_string(m) + "x" + std::to_string(n), kind, precision, m, n, 1, {}};
    const int64_t columns = n - bias;
    const std::vector<int64_t> strides = transposed ? std::vector<int64_t>{1, m} : std::vector<int64_t>{columns, 1};
    l.layout.parts.push_back({{m, columns}, strides, strides, Type::f32, Type::f32, 0});
    if (bias) {
        l.layout.parts.push_back({{m}, {1}, {1}, Type::f32, Type::f32, columns});
    }
    for (const PartLayout& part : l.layout.parts) {
        const int64_t count = part.shape.size() == 2 ? m * columns : m;
        l.thetas.push_back(memory.floats(count));
        l.gs.push_back(memory.floats(count));
    }
    const bool diagonal = kind == Kind::diagonal;
    l.R = memory.floats(diagonal ? m * n : m * m), l.L = memory.floats(diagonal ? 0 : n * n);
    l.P = memory.floats(m * m), l.S = memory.floats(n * n);
    l.A = kind == Kind::scaled_kron ? memory.floats(m * n) : nullptr;
    l.momentum = memory.floats(m * n), l.v = memory.floats(m * n), l.fv = memory.floats(m * n);
    l.out = memory.floats(m * n), l.step = memory.floats(1, false), l.aux_step = memory.floats(1, false);
    for (int i = 0; i < 4; ++i) {
        l.moments.push_back(memory.floats(diagonal ? m * n : i < 2 ? m * m : n * n, false));
    }
    return l;
}

bool close(double got, double want, double size) { return std::abs(got - want) <= 2e-2 * size + 1e-6; }

/// Layers of all shapes in ieee; those with tensor cores, which are slow here, are few. Layers with an outer diagonal
/// are the last.
struct Layers {
    Memory memory;
    std::vector<Layer> all;
    size_t without_scale;

    explicit Layers(Precision precision) {
        const auto add = [&](Kind kind, int64_t m, int64_t n, bool bias, bool transposed) {
            all.push_back(layer(memory, kind, precision, m, n, bias, transposed));
        };
        add(Kind::kron, 1, 1, false, false);
        add(Kind::kron, 5, 3, true, false);
        add(Kind::kron, 33, 34, true, true);
        if (precision == Precision::ieee) {
            add(Kind::kron, 259, 33, true, false);
            add(Kind::kron, 6, 258, false, false);
            add(Kind::kron, 0, 4, false, false);
            add(Kind::diagonal, 67, 63, false, true);
        }
        without_scale = all.size();
        add(Kind::scaled_kron, 17, 9, true, false);
        add(Kind::scaled_kron, 3, 261, true, false);
    }

    /// Of the first ``count`` layers.
    Plan plan(Op op, size_t count, bool spectral = false) const {
        std::vector<BlockLayout> blocks;
        for (size_t k = 0; k < count; ++k) {
            blocks.push_back(all[k].layout);
            blocks.back().flat = spectral && std::min(all[k].layout.m, all[k].layout.n) > 1;
        }
        return Plan(op, blocks, 0);
    }
};

/// What the first ``count`` layers hand over at a step.
struct Handed {
    std::vector<int64_t> g, scale, operators, momentum, steps, aux_steps, theta, lr_pointers, adam, v, fv, outs;
    std::vector<double> beta, base_lr, step, lr, decay;

    Handed(const Layers& layers, size_t count) {
        for (size_t k = 0; k < count; ++k) {
            const Layer& l = layers.all[k];
            const bool diagonal = l.layout.kind == Kind::diagonal;
            operators.insert(operators.end(), {number(diagonal ? l.R : l.P), l.layout.m, number(l.S), l.layout.n,
                                               number(l.A)});
            momentum.push_back(number(l.momentum)), steps.push_back(number(l.step));
            aux_steps.push_back(number(l.aux_step)), v.push_back(number(l.v)), fv.push_back(number(l.fv));
            outs.push_back(number(l.out));
            adam.insert(adam.end(), {number(l.R), number(l.moments[0]), number(l.moments[1]), number(l.L),
                                     number(l.moments[2]), number(l.moments[3])});
            beta.push_back(0.9), base_lr.push_back(0.1), step.push_back(0);
            for (size_t i = 0; i < l.gs.size(); ++i) {
                g.push_back(number(l.gs[i])), scale.push_back(0);
                theta.push_back(number(l.thetas[i])), lr_pointers.push_back(0);
                lr.push_back(0.1), decay.push_back(0.01);
            }
        }
    }
    Gradients gradients() const { return {g, scale}; }
};

void refresh(Layers& layers) {
    std::vector<int64_t> pointers;
    for (size_t k = 0; k < layers.without_scale; ++k) {
        const Layer& l = layers.all[k];
        const int64_t m = l.layout.m, n = l.layout.n;
        if (l.layout.kind != Kind::diagonal) {
            pointers.insert(pointers.end(), {number(l.R), number(l.L), number(l.P), m, number(l.S), n});
        }
    }
    layers.plan(Op::refresh, layers.without_scale).refresh(nullptr, pointers);
    for (size_t k = 0; k < layers.without_scale; ++k) {
        const Layer& l = layers.all[k];
        const int64_t m = l.layout.m, i = m / 2, j = m - 1;
        if (l.layout.kind == Kind::diagonal || m == 0) {
            continue;
        }
        double want = 0, size = 0;
        for (int64_t k = 0; k < m; ++k) {
            const double term = static_cast<double>(l.R[k * m + i]) * l.R[k * m + j];
            want += term, size += std::abs(term);
        }
        expect(close(l.P[i * m + j], want, size) && l.P[i * m + j] == l.P[j * m + i], "P", l.layout.name);
    }
}

/// The last entry of Q u: what it should be, and the sum of its terms' magnitudes.
std::pair<double, double> wanted_product(const Layer& l) {
    const int64_t m = l.layout.m, n = l.layout.n, i = m - 1, j = n - 1;
    const auto u = [&](int64_t i, int64_t j) {
        const PartLayout& weight = l.layout.parts[0];
        const bool bias = j == weight.shape[1];
        const double g = bias ? l.gs[1][i] : l.gs[0][i * weight.g_strides[0] + j * weight.g_strides[1]];
        return l.A ? g * l.A[i * n + j] : g;
    };
    if (l.layout.kind == Kind::diagonal) {
        const double want = u(i, j) * l.R[i * n + j] * l.R[i * n + j];
        return {want, std::abs(want)};
    }
    double want = 0, size = 0;
    for (int64_t a = 0; a < m; ++a) {
        for (int64_t b = 0; b < n; ++b) {
            const double term = l.P[i * m + a] * u(a, b) * l.S[b * n + j] * (l.A ? l.A[i * n + j] : 1);
            want += term, size += std::abs(term);
        }
    }
    return {want, size};
}

void qv(Layers& layers) {
    Plan plan = layers.plan(Op::qv, layers.all.size());
    const Handed handed(layers, layers.all.size());
    plan.qv(nullptr, number(layers.memory.bytes(plan.workspace_bytes)), handed.gradients(), handed.operators,
            handed.outs);
    for (const Layer& l : layers.all) {
        const int64_t m = l.layout.m, n = l.layout.n;
        if (m == 0) {
            continue;
        }
        const auto [want, size] = wanted_product(l);
        expect(close(l.out[(m - 1) * n + n - 1], want, size), "Q u", l.layout.name);
    }
}

/// The ``count``th step.
void theta_step(Layers& layers, int count, bool after, Normalize normalize) {
    const size_t all = layers.all.size();
    const bool spectral = normalize == Normalize::spectral;
    Plan step = layers.plan(Op::theta, all, spectral);
    const Handed h(layers, all);
    const std::vector<double> coefficients = spectral ? std::vector<double>{8, -24, 17, 4, -3, 0.5}
                                                      : std::vector<double>{};
    float* const norms = layers.memory.floats(static_cast<int64_t>(all));
    char* const ok = layers.memory.bytes(1);
    step.theta_step(nullptr, number(layers.memory.bytes(step.workspace_bytes)),
                    {h.gradients(), h.operators, h.momentum, h.steps, h.theta, h.lr_pointers, h.beta, h.base_lr, h.step,
                     h.lr, h.decay, coefficients},
                    after, 1 + after, normalize, 1e-3, number(norms), 0, number(ok));
    expect(*ok == 1 && *layers.all[0].step == count, "θ step", "all");
}

void lambda_steps(Layers& layers) {
    Plan learn = layers.plan(Op::lambda, layers.without_scale);
    const Handed h(layers, layers.without_scale);
    char* const workspace = layers.memory.bytes(learn.workspace_bytes);
    float* const loss = layers.memory.floats(2);
    char* const ok = layers.memory.bytes(1);
    for (const bool precondition : {false, true}) {
        learn.aux_loss(nullptr, number(workspace), {h.gradients(), h.operators, h.adam, h.v, h.fv, h.aux_steps}, 0.1,
                       precondition, number(loss), number(loss + 1));
        learn.aux_update(nullptr, number(workspace), h.step, precondition, 1e-3, 0, 0.9, 0.999, 1e-8, number(ok));
        expect(*ok == 1 && *layers.all[0].aux_step == 1 + precondition, "λ step", "all");
    }
}

void inner_product(Layers& layers) {
    const float* const g = layers.all[2].gs[0];
    const std::vector<int64_t> two{number(g), number(g)}, count{33 * 33}, types{0, 0};
    float* const found = layers.memory.floats(1);
    inner(0, nullptr, two, count, types, number(layers.memory.bytes(sizeof(Sums))), 0, number(found));
    double want = 0;
    for (int64_t i = 0; i < count[0]; ++i) {
        want += static_cast<double>(g[i]) * g[i];
    }
    expect(close(*found, want, 1e-4 * want), "inner product", "all");
}

void run(Precision precision) {
    Layers layers(precision);
    refresh(layers);
    qv(layers);
    theta_step(layers, 1, false, Normalize::rms);
    theta_step(layers, 2, false, Normalize::spectral);
    if (precision == Precision::ieee) {
        theta_step(layers, 3, true, Normalize::trust);
        theta_step(layers, 4, true, Normalize::spectral);
    }
    lambda_steps(layers);
    inner_product(layers);
}

}  // namespace

int main() {
    for (const Precision precision : {Precision::ieee, Precision::tf32x3, Precision::tf32, Precision::bf16}) {
        run(precision);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
