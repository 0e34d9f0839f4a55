// Anchoring on a CPU (cpu/anchor).
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "bindings/bindings.h"
#include "cpu/anchor/inverse_root.h"
#include "cpu/anchor/moments.h"

namespace py = pybind11;

namespace fishleg {

using namespace cpu;

namespace {

// (x, positions, size, stride, out, alpha)
using MomentTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, double>;

Moment moment_of(const MomentTuple& row, double beta) {
    const auto& [x, positions, size, stride, out, alpha] = row;
    if (positions < 0 || size < 1 || stride < size)
        throw std::invalid_argument("x should be a matrix whose rows have no gaps but is: " +
                                    std::to_string(positions) + " by " + std::to_string(size) + ", rows " +
                                    std::to_string(stride) + " apart");
    return {pointer<const float>(x), positions, size, stride, pointer<float>(out), static_cast<float>(alpha),
            static_cast<float>(beta)};
}

/// As Python sees them; characters would be text.
std::vector<bool> flags(const std::vector<char>& done) { return {done.begin(), done.end()}; }

std::vector<bool> average_all(const std::string& engine,
                              const std::vector<std::tuple<MomentTuple, MomentTuple>>& rows, double beta, int threads) {
    std::vector<Moments> blocks;
    for (const auto& [first, second] : rows) blocks.push_back({moment_of(first, beta), moment_of(second, beta)});
    const Engine& with = engine_of(engine);
    py::gil_scoped_release released;
    return flags(average(with, blocks, threads));
}

// (G, Ā, R, L, m, n, weight)
using StartTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, double>;

std::vector<bool> start_all(const std::string& engine, const std::vector<StartTuple>& rows, double damping,
                            int threads) {
    std::vector<KfacStart> blocks;
    for (const auto& [g, a, r, l, m, n, weight] : rows) {
        if (m < 1 || n < 1) throw std::invalid_argument("m and n should be at least 1 but are: " + std::to_string(m) +
                                                        ", " + std::to_string(n));
        blocks.push_back({pointer<const float>(g), pointer<const float>(a), pointer<float>(r), pointer<float>(l), m, n,
                          weight, damping});
    }
    const Engine& with = engine_of(engine);
    py::gil_scoped_release released;
    return flags(start_kfac(with, blocks, threads));
}

}  // namespace

void bind_anchor(py::module_& m) {
    m.def("average_moments", &average_all, "Average xᵀx into second moments; of each block whether it is finite.");
    m.def("start_kfac", &start_all, "R and L from second moments; of each block whether it was done.");
}

}  // namespace fishleg
