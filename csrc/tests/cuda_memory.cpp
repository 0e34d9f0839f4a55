// Runs every kernel of the CUDA plan on the CPU with buffers of exactly the size they need, for AddressSanitizer and
// UndefinedBehaviorSanitizer; products are compared with loops in double. Exits with 1 where something is wrong.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
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

/// A layer (m, n − bias) with its bias, transposed where ``turned``; or a Diagonal.
Layer layer(Memory& memory, Kind kind, Precision precision, int64_t m, int64_t n, bool bias, bool turned) {
    Layer l{};
    l.layout = {std::to_string(m) + "x" + std::to_string(n), kind, precision, m, n, 1, {}};
    const int64_t columns = n - bias;
    const std::vector<int64_t> strides = turned ? std::vector<int64_t>{1, m} : std::vector<int64_t>{columns, 1};
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

/// All kernels and shapes in ieee; those with tensor cores, which are slow here, on a few.
void run(Precision precision) {
    const bool full = precision == Precision::ieee;
    Memory memory;
    std::vector<Layer> layers;
    layers.push_back(layer(memory, Kind::kron, precision, 1, 1, false, false));
    layers.push_back(layer(memory, Kind::kron, precision, 5, 3, true, false));
    layers.push_back(layer(memory, Kind::kron, precision, 33, 34, true, true));
    if (full) {
        layers.push_back(layer(memory, Kind::kron, precision, 259, 33, true, false));
        layers.push_back(layer(memory, Kind::kron, precision, 6, 258, false, false));
        layers.push_back(layer(memory, Kind::kron, precision, 0, 4, false, false));
        layers.push_back(layer(memory, Kind::diagonal, precision, 67, 63, false, true));
    }
    const size_t without_scale = layers.size();
    layers.push_back(layer(memory, Kind::scaled_kron, precision, 17, 9, true, false));
    layers.push_back(layer(memory, Kind::scaled_kron, precision, 3, 261, true, false));

    const auto plan = [&](Op op, size_t count) {
        std::vector<BlockLayout> blocks;
        for (size_t k = 0; k < count; ++k) {
            blocks.push_back(layers[k].layout);
        }
        return Plan(op, blocks, 0);
    };
    const size_t all = layers.size();
    std::vector<int64_t> pointers;
    for (size_t k = 0; k < without_scale; ++k) {
        const Layer& l = layers[k];
        const int64_t m = l.layout.m, n = l.layout.n;
        if (l.layout.kind != Kind::diagonal) {
            pointers.insert(pointers.end(), {number(l.R), number(l.L), number(l.P), m, number(l.S), n});
        }
    }
    plan(Op::refresh, without_scale).refresh(nullptr, pointers);
    for (size_t k = 0; k < without_scale; ++k) {
        const Layer& l = layers[k];
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

    pointers.clear();
    Plan product = plan(Op::qv, all);
    for (const Layer& l : layers) {
        const bool diagonal = l.layout.kind == Kind::diagonal;
        pointers.insert(pointers.end(), {number(diagonal ? l.R : l.P), l.layout.m, number(l.S), l.layout.n, number(l.A), number(l.out)});
        for (float* g : l.gs) {
            pointers.insert(pointers.end(), {number(g), 0});
        }
    }
    product.qv(nullptr, number(memory.bytes(product.workspace_bytes)), pointers);
    for (const Layer& l : layers) {
        const int64_t m = l.layout.m, n = l.layout.n;
        if (m == 0) {
            continue;
        }
        const auto u = [&](int64_t i, int64_t j) {
            const PartLayout& weight = l.layout.parts[0];
            const bool bias = j == weight.shape[1];
            const double g = bias ? l.gs[1][i] : l.gs[0][i * weight.g_strides[0] + j * weight.g_strides[1]];
            return l.A ? g * l.A[i * n + j] : g;
        };
        const int64_t i = m - 1, j = n - 1;
        double want = 0, size = 0;
        if (l.layout.kind == Kind::diagonal) {
            want = u(i, j) * l.R[i * n + j] * l.R[i * n + j], size = std::abs(want);
        } else {
            for (int64_t a = 0; a < m; ++a) {
                for (int64_t b = 0; b < n; ++b) {
                    const double term = l.P[i * m + a] * u(a, b) * l.S[b * n + j] * (l.A ? l.A[i * n + j] : 1);
                    want += term, size += std::abs(term);
                }
            }
        }
        expect(close(l.out[i * n + j], want, size), "Q u", l.layout.name);
    }

    for (const bool after : {false, true}) {
        if (after && !full) {
            break;
        }
        Plan step = plan(Op::theta, all);
        pointers.clear();
        std::vector<double> numbers;
        for (const Layer& l : layers) {
            const bool diagonal = l.layout.kind == Kind::diagonal;
            pointers.insert(pointers.end(), {number(l.momentum), number(diagonal ? l.R : l.P), l.layout.m, number(l.S),
                                             l.layout.n, number(l.A), number(l.step)});
            for (float* g : l.gs) {
                pointers.insert(pointers.end(), {number(g), 0});
            }
            numbers.insert(numbers.end(), {0.9, 0.1, 0});
            for (float* theta : l.thetas) {
                pointers.insert(pointers.end(), {number(theta), 0});
                numbers.insert(numbers.end(), {0.1, 0.01});
            }
        }
        float* const norms = memory.floats(static_cast<int64_t>(all));
        char* const ok = memory.bytes(1);
        step.theta_step(nullptr, number(memory.bytes(step.workspace_bytes)), pointers, numbers, after, 1 + after,
                        after ? Normalize::trust : Normalize::rms, 1e-3, number(norms), 0, number(ok));
        expect(*ok == 1 && *layers[0].step == 1 + after, "θ step", "all");
    }

    Plan learn = plan(Op::lambda, without_scale);
    pointers.clear();
    const std::vector<double> steps(without_scale, 0.0);
    for (size_t k = 0; k < without_scale; ++k) {
        const Layer& l = layers[k];
        pointers.insert(pointers.end(), {number(l.P), l.layout.m, number(l.S), l.layout.n, number(l.R), number(l.moments[0]),
                                         number(l.moments[1]), number(l.L), number(l.moments[2]),
                                         number(l.moments[3]), number(l.v), number(l.fv), number(l.aux_step)});
        for (float* g : l.gs) {
            pointers.insert(pointers.end(), {number(g), 0});
        }
    }
    char* const workspace = memory.bytes(learn.workspace_bytes);
    float* const loss = memory.floats(2);
    char* const ok = memory.bytes(1);
    for (const bool precondition : {false, true}) {
        learn.aux_loss(nullptr, number(workspace), pointers, 0.1, precondition, number(loss), number(loss + 1));
        learn.aux_update(nullptr, number(workspace), steps, 0.1, precondition, 1e-3, 0, 0.9, 0.999, 1e-8, number(ok));
        expect(*ok == 1 && *layers[0].aux_step == 1 + precondition, "λ step", "all");
    }

    const std::vector<int64_t> two{number(layers[2].gs[0]), number(layers[2].gs[0])}, count{33 * 33}, types{0, 0};
    inner(0, nullptr, two, count, types, number(memory.bytes(sizeof(Sums))), 0, number(loss));
    double want = 0;
    for (int64_t i = 0; i < count[0]; ++i) {
        want += static_cast<double>(layers[2].gs[0][i]) * layers[2].gs[0][i];
    }
    expect(close(*loss, want, 1e-4 * want), "inner product", "all");
}

}  // namespace

int main() {
    for (const Precision precision : {Precision::ieee, Precision::tf32x3, Precision::tf32, Precision::bf16}) {
        run(precision);
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
