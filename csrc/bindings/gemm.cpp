// Packed products on a CPU (cpu/gemm).
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <tuple>

#include "bindings/bindings.h"
#include "cpu/gemm/products.h"
#include "cpu/step/polar.h"

namespace py = pybind11;

namespace fishleg {

using namespace cpu;

namespace {

[[noreturn]] void refuse(const char* name, int64_t value, const char* wanted) {
    throw std::invalid_argument(std::string(name) + " should be " + wanted + " but is: " + std::to_string(value));
}

// (side, source, lanes, depth, lane stride, depth stride, to, the operand's depth, where in it this one starts)
using PackTuple = std::tuple<int, uintptr_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, int64_t, int64_t>;

void pack_all(const std::string& engine, const std::vector<PackTuple>& rows, int threads) {
    const Engine& with = engine_of(engine);
    std::vector<PackJob> jobs;
    for (const auto& [side, source, lanes, depth, lane_stride, depth_stride, to, whole, after] : rows) {
        if (side < 0 || side > 1) refuse("side", side, "0 or 1");
        if (lanes < 0 || depth < 0) refuse("lanes and depth", std::min(lanes, depth), "at least 0");
        if (lane_stride != 1 && depth_stride != 1) refuse("one stride", std::min(lane_stride, depth_stride), "1");
        if (after < 0 || after % with.depth_step || after + depth > whole)
            refuse("after", after, "a multiple within the depth");
        const Lanes from{pointer<const float>(source), lanes, depth, lane_stride, depth_stride};
        jobs.push_back({static_cast<Side>(side), from, pointer(to), whole, after});
    }
    py::gil_scoped_release released;
    pack(with, jobs, threads);
}

// (left, right, rows, columns, depth, target, out, stride, symmetric)
using ProductTuple =
    std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int, uintptr_t, int64_t, bool>;

void multiply_all(const std::string& engine, const std::vector<ProductTuple>& rows, int threads) {
    std::vector<Product> products;
    for (const auto& [left, right, m, n, depth, target, out, stride, symmetric] : rows) {
        if (target < 0 || target > 2) refuse("target", target, "0, 1 or 2");
        if (m < 0 || n < 0 || depth < 0) refuse("rows, columns and depth", std::min({m, n, depth}), "at least 0");
        if (symmetric && m != n) refuse("columns", n, "as many as rows where symmetric");
        if (target == 0 && m > 1 && stride < n) refuse("stride", stride, "at least columns");
        products.push_back(
            {pointer(left), pointer(right), m, n, depth, static_cast<Target>(target), pointer(out), stride, symmetric,
             1, 0});
    }
    const Engine& with = engine_of(engine);
    py::gil_scoped_release released;
    multiply(with, products, threads);
}

// (x, m, n, steps to a product with x)
using PolarTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

void polar_all(const std::string& engine, const std::vector<PolarTuple>& rows,
               const std::vector<std::array<float, 3>>& coefficients, int threads) {
    const Engine& with = engine_of(engine);
    std::vector<PolarMatrix> matrices;
    for (const auto& [x, m, n, together] : rows) {
        if (m < 0 || n < 0) refuse("m and n", std::min(m, n), "at least 0");
        if (together < 1) refuse("the steps to a product", together, "at least 1");
        matrices.push_back({pointer<float>(x), m, n, together});
    }
    py::gil_scoped_release released;
    polar_factors(with, matrices, coefficients, threads);
}

}  // namespace

void bind_gemm(py::module_& m) {
    m.def("engines", [] {
        std::vector<std::string> names;
        for (const Engine* engine : engines()) names.emplace_back(engine->name);
        return names;
    }, "The engines for packed products that this processor has.");
    m.def("depth_step", [](const std::string& engine) { return engine_of(engine).depth_step; },
          "What an engine pads the depth of operands to multiples of.");
    m.def("packed_size", [](const std::string& engine, int64_t lanes, int64_t depth) {
        if (lanes < 0 || depth < 0) refuse("lanes and depth", std::min(lanes, depth), "at least 0");
        return packed_size(engine_of(engine), lanes, depth);
    }, "Bytes of a packed operand.");
    m.def("pack", &pack_all, "Pack operands.");
    m.def("multiply", &multiply_all, "Products of packed operands.");
    m.def("polar_factors", &polar_all, "Polar factors in the place of matrices, by an engine that packs both sides alike.");
}

}  // namespace fishleg
