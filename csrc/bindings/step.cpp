// The θ step, Adam on λ and inner products on a CPU (cpu/step).
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "bindings/bindings.h"
#include "cpu/step/adam.h"
#include "cpu/step/agreement.h"
#include "cpu/step/inner.h"
#include "cpu/step/step_plan.h"

namespace py = pybind11;

namespace fishleg {

using namespace cpu;

namespace {

Dtype dtype_of(int code) {
    if (code < 0 || code > 3) throw std::invalid_argument("dtype should be 0 to 3 but is: " + std::to_string(code));
    return static_cast<Dtype>(code);
}

// (address, row stride, column stride, dtype)
using ViewTuple = std::tuple<uintptr_t, int64_t, int64_t, int>;

View view_of(const ViewTuple& v) {
    return {pointer(std::get<0>(v)), std::get<1>(v), std::get<2>(v), dtype_of(std::get<3>(v))};
}

// (name, dtype of λ, rows, columns, width of each parameter)
using ShapeTuple = std::tuple<std::string, int, int64_t, int64_t, std::vector<int64_t>>;

std::unique_ptr<StepPlan> make(const std::vector<ShapeTuple>& shapes) {
    std::vector<Block> blocks;
    for (const auto& [name, dtype, rows, columns, widths] : shapes) {
        Block block;
        block.name = name;
        block.dtype = dtype_of(dtype);
        block.rows = rows;
        block.columns = columns;
        int64_t first = 0;
        for (int64_t width : widths) {
            Part part;
            part.first = first;
            part.width = width;
            block.parts.push_back(part);
            first += width;
        }
        blocks.push_back(std::move(block));
    }
    return std::make_unique<StepPlan>(std::move(blocks));
}

void place(StepPlan& plan, size_t index, uintptr_t momentum, uintptr_t step, uintptr_t diagonal,
           const std::vector<std::tuple<ViewTuple, ViewTuple, bool>>& parts) {
    Block& block = plan.blocks().at(index);
    if (parts.size() != block.parts.size())
        throw std::invalid_argument("block '" + block.name + "' should get " + std::to_string(block.parts.size()) +
                                    " parameters but gets: " + std::to_string(parts.size()));
    block.momentum = pointer(momentum);
    block.step = pointer<float>(step);
    block.diagonal = pointer(diagonal);
    for (size_t k = 0; k < parts.size(); ++k) {
        block.parts[k].param = view_of(std::get<0>(parts[k]));
        block.parts[k].grad = view_of(std::get<1>(parts[k]));
        block.parts[k].moves = std::get<2>(parts[k]);
    }
}

void point(StepPlan& plan, const std::vector<uintptr_t>& grads) {
    size_t count = 0;
    for (const Block& block : plan.blocks()) count += block.parts.size();
    if (grads.size() != count)
        throw std::invalid_argument("grads should have " + std::to_string(count) + " addresses but have: " +
                                    std::to_string(grads.size()));
    size_t k = 0;
    for (Block& block : plan.blocks())
        for (Part& part : block.parts) part.grad.data = pointer(grads[k++]);
}

void give(StepPlan& plan, size_t index, int source, uintptr_t given, uintptr_t product, double fixed_scale) {
    Block& block = plan.blocks().at(index);
    block.source = static_cast<Source>(source);
    block.given = pointer(given);
    block.product = pointer(product);
    block.fixed_scale = fixed_scale;
    block.factors = {};
}

// Low-rank Q g as packed factors (see cpu/gemm/products.h), with Q m of the step before.
void give_packed(StepPlan& plan, const std::string& engine,
                 const std::vector<std::tuple<size_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t>>& rows) {
    plan.use(engine_of(engine));
    for (const auto& [index, left, right, depth, scratch, product] : rows) {
        Block& block = plan.blocks().at(index);
        block.source = Source::low_rank;
        block.given = nullptr;
        block.factors = {pointer(left), pointer(right), depth};
        block.scratch = pointer<float>(scratch);
        block.fixed_scale = 0;
        block.product = pointer(product);
    }
}

void set_rates(StepPlan& plan, const std::vector<double>& lrs, const std::vector<double>& decays,
               const std::vector<double>& betas, const std::vector<double>& base_lrs) {
    size_t count = 0;
    for (const Block& block : plan.blocks()) count += block.parts.size();
    if (lrs.size() != count || decays.size() != count || betas.size() != plan.blocks().size() ||
        base_lrs.size() != plan.blocks().size())
        throw std::invalid_argument("rates should be one a parameter, " + std::to_string(count) + ", or one a block, " +
                                    std::to_string(plan.blocks().size()));
    size_t b = 0, k = 0;
    for (Block& block : plan.blocks()) {
        block.beta = betas[b];
        block.base_lr = base_lrs[b++];
        for (Part& part : block.parts) {
            part.lr = lrs[k];
            part.weight_decay = decays[k++];
        }
    }
}

Normalize normalize_of(const std::optional<std::string>& name) {
    if (!name) return Normalize::none;
    if (*name == "rms") return Normalize::rms;
    if (*name == "trust") return Normalize::trust;
    throw std::invalid_argument("normalize should be 'rms', 'trust' or None but is: " + *name);
}

bool theta_step(StepPlan& plan, uintptr_t norms, int times, const std::optional<std::string>& normalize, double kappa,
                int threads) {
    const ThetaOptions options{times, normalize_of(normalize), kappa, threads};
    py::gil_scoped_release released;
    return plan.theta_step(options, pointer<double>(norms));
}

void average(StepPlan& plan, const std::vector<uintptr_t>& outs, int times, int threads) {
    std::vector<void*> places;
    for (uintptr_t out : outs) places.push_back(pointer(out));
    py::gil_scoped_release released;
    plan.average(places, {times, Normalize::none, 0, threads});
}

// (name, count, value, exp_avg, exp_avg_sq, gradient, its dtype, that of the others, step), and in place of a gradient
// (left operand, right operand, depth, λ's columns)
using AdamTuple = std::tuple<std::string, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int, double,
                             std::optional<std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>>>;

bool adam(const std::vector<AdamTuple>& rows, double lr, double beta1, double beta2, double eps, int threads,
          const std::optional<std::string>& engine) {
    std::vector<AdamTensor> tensors;
    for (const auto& [name, count, value, exp_avg, exp_avg_sq, grad, grad_dtype, dtype, step, packed] : rows) {
        AdamTensor tensor;
        tensor.name = name;
        tensor.count = count;
        tensor.value = pointer(value);
        tensor.exp_avg = pointer(exp_avg);
        tensor.exp_avg_sq = pointer(exp_avg_sq);
        tensor.grad = pointer(grad);
        tensor.grad_dtype = dtype_of(grad_dtype);
        tensor.dtype = dtype_of(dtype);
        tensor.step = step;
        if (packed) {
            const auto& [left, right, depth, columns] = *packed;
            tensor.factors = {pointer(left), pointer(right), depth};
            tensor.columns = columns;
        }
        tensors.push_back(std::move(tensor));
    }
    const Engine* with = engine ? &engine_of(*engine) : nullptr;
    py::gil_scoped_release released;
    return adam_step(tensors, {lr, beta1, beta2, eps, threads, with});
}

double inner_of(const std::vector<uintptr_t>& xs, const std::vector<uintptr_t>& ys, const std::vector<int64_t>& counts,
                const std::vector<int>& dtypes, int threads) {
    if (ys.size() != xs.size() || counts.size() != xs.size() || dtypes.size() != xs.size())
        throw std::invalid_argument("xs, ys, counts and dtypes should be of one length");
    std::vector<Pair> pairs;
    for (size_t k = 0; k < xs.size(); ++k)
        pairs.push_back({pointer(xs[k]), pointer(ys[k]), counts[k], dtype_of(dtypes[k])});
    py::gil_scoped_release released;
    return inner(pairs, threads);
}

// (dtype, r, m, E, H, z, (address, width) of each parameter's gradient)
using LowRankTuple = std::tuple<int, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                             std::vector<std::pair<uintptr_t, int64_t>>>;

using AgreementTuple = std::tuple<double, double, double, double>;

std::vector<AgreementTuple> agreements_of(const std::vector<LowRankTuple>& rows, int threads) {
    std::vector<LowRankGradient> gradients;
    for (const auto& [dtype, rank, m, E, H, z, columns] : rows) {
        if (dtype < 0 || dtype > 1)
            throw std::invalid_argument("dtype should be 0 or 1 but is: " + std::to_string(dtype));
        LowRankGradient gradient{dtype_of(dtype), rank, m, pointer(E), pointer(H), pointer(z), {}};
        for (const auto& [grad, width] : columns) gradient.columns.push_back({pointer(grad), width});
        gradients.push_back(std::move(gradient));
    }
    std::vector<AgreementTuple> found;
    py::gil_scoped_release released;
    for (const Agreement& a : agreements(gradients, threads))
        found.emplace_back(a.size, a.difference, a.rows, a.square);
    return found;
}

}  // namespace

void bind_step(py::module_& m) {
    py::class_<StepPlan>(m, "StepPlan", "The θ step of a list of blocks on a CPU (csrc/cpu/step/step_plan.h).")
        .def(py::init(&make), "blocks: (name, dtype of λ, rows, columns, width of each parameter).")
        .def("place", &place, "Where a block's momentum, counter, d, parameters and gradients are.")
        .def("point", &point, "Where all gradients are, in the layouts they had.")
        .def("give", &give, "What a block's natural gradient is made of in this step.", py::arg("index"), py::arg("source"),
             py::arg("given"), py::arg("product"), py::arg("fixed_scale") = 0.0)
        .def("give_packed", &give_packed,
             "The same for low-rank gradients: (index, (E P)ᵀ and H S packed, depth, scratch memory or 0, Q m).")
        .def("set_rates", &set_rates, "lr and weight decay of each parameter, beta and base lr of each block.")
        .def("average", &average, "m̂ of the blocks that have a place, into it.")
        .def("theta_step", &theta_step, "One step; norms (float64) are written. Whether it was taken.");
    m.def("adam_step", &adam, "One Adam step of λ's tensors; false, and nothing written, where one is not finite.");
    m.def("agreements", &agreements_of, "How far gradients are from low-rank products, on one vector each.");
    m.def("inner", &inner_of, "Σ ⟨x, y⟩.");
    m.def("instruction_set", [] { return kernels(Dtype::float32).name; }, "What the CPU kernels were compiled for.");
}

}  // namespace fishleg
