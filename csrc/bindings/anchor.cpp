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

// (x, positions, size, stride, out, its stride, alpha)
using MomentTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int64_t, double>;

Moment moment_of(const MomentTuple& row, double beta) {
    const auto& [x, positions, size, stride, out, out_stride, alpha] = row;
    if (positions < 0 || size < 1 || stride < size || out_stride < size)
        throw std::invalid_argument("x should be a matrix whose rows have no gaps but is: " +
                                    std::to_string(positions) + " by " + std::to_string(size) + ", rows " +
                                    std::to_string(stride) + " apart");
    return {pointer<const float>(x), positions, size, stride, pointer<float>(out), out_stride,
            static_cast<float>(alpha), static_cast<float>(beta)};
}

/// As Python sees them; characters would be text.
std::vector<bool> flags(const std::vector<char>& done) { return {done.begin(), done.end()}; }

std::vector<bool> average_all(const std::string& engine,
                              const std::vector<std::vector<MomentTuple>>& rows, double beta, int threads) {
    std::vector<Moments> blocks;
    for (const auto& row : rows) {
        Moments block;
        for (const MomentTuple& moment : row) block.push_back(moment_of(moment, beta));
        blocks.push_back(std::move(block));
    }
    const Engine& with = engine_of(engine);
    py::gil_scoped_release released;
    return flags(average(with, blocks, threads));
}

// (G or Ā, R or L, size, parts, width)
using SideTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
using StartTuple = std::tuple<SideTuple, SideTuple, double>;

KfacSide side_of(const SideTuple& row) {
    const auto& [moment, root, size, parts, width] = row;
    if (size < 1 || parts < 1 || width < 1 || parts * width < size)
        throw std::invalid_argument("parts of one width should hold all rows but are: " + std::to_string(parts) +
                                    " of " + std::to_string(width) + " for " + std::to_string(size));
    return {pointer<const float>(moment), pointer<float>(root), size, parts, width};
}

std::vector<bool> start_all(const std::string& engine, const std::vector<StartTuple>& rows, double damping,
                            int threads) {
    std::vector<KfacStart> blocks;
    for (const auto& [first, second, weight] : rows)
        blocks.push_back({side_of(first), side_of(second), weight, damping});
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
