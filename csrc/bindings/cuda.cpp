// Plans of CUDA kernels (cuda/host/plan.h). Tensors are looked at where they are at every step; where one does not lie as
// the plan has it, an op returns False and has launched nothing. Streams, workspaces and results are integers.
#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.h"
#include "bindings/cuda_plan.h"
#include "bindings/lists.h"

namespace py = pybind11;

namespace fishleg {

using namespace cuda;

namespace {

Stream stream_at(int64_t stream) { return reinterpret_cast<Stream>(stream); }

/// A list of numbers from array.array("q"); it has to outlive the span.
std::span<const int64_t> list_of(const py::buffer_info& info) {
    if (info.ndim != 1 || info.itemsize != sizeof(int64_t) || info.strides[0] != sizeof(int64_t)) {
        throw py::type_error("an array of 64-bit numbers is needed");
    }
    return {static_cast<const int64_t*>(info.ptr), static_cast<size_t>(info.shape[0])};
}

using PartTuple = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int, int, int64_t,
                             int64_t>;
using BlockTuple = std::tuple<std::string, int, int, int64_t, int64_t, int, std::vector<PartTuple>, bool>;

TensorPlan make_plan(int op, const std::vector<BlockTuple>& tuples, int device) {
    std::vector<BlockLayout> blocks;
    for (const auto& [name, kind, precision, m, n, axis, parts, flat] : tuples) {
        BlockLayout b{name, static_cast<Kind>(kind), static_cast<Precision>(precision), m, n, axis, {}, flat};
        for (const auto& [shape, theta_strides, g_strides, theta_type, g_type, offset, first_row] : parts) {
            b.parts.push_back({shape, theta_strides, g_strides, static_cast<Type>(theta_type),
                               static_cast<Type>(g_type), offset, first_row});
        }
        blocks.push_back(std::move(b));
    }
    return TensorPlan(Plan(static_cast<Op>(op), std::move(blocks), device));
}

}  // namespace

void bind_cuda(py::module_& m) {
    // Local: tests load a second module with it, whose kernels run on the CPU.
    py::class_<TensorPlan>(m, "CudaPlan", py::module_local(),
                           "What one op needs to know of a list of blocks; see csrc/cuda/host/plan.h.")
        .def(py::init(&make_plan), py::arg("op"), py::arg("blocks"), py::arg("device"))
        .def_property_readonly("workspace_bytes", [](const TensorPlan& t) { return t.plan.workspace_bytes; })
        .def_property_readonly("external", [](const TensorPlan& t) { return t.plan.external; })
        .def_property_readonly("external_2", [](const TensorPlan& t) { return t.plan.external_2; })
        .def_property_readonly("scales", [](const TensorPlan& t) { return t.plan.scales; })
        .def("polar", [](const TensorPlan& t, size_t k) { return t.plan.polar(k); })
        .def("theta_step",
             [](TensorPlan& t, int64_t stream, int64_t workspace, const py::list& parameters, const py::list& gradients,
                const std::optional<py::list>& factors, const std::optional<py::list>& operators,
                const py::list& momenta,
                const py::list& steps, const py::buffer& group_of_block, const py::buffer& group_of_part,
                const std::vector<Rates>& groups, const py::list& rates, const std::vector<double>& coefficients,
                bool on_device, bool after, int times, int normalize, double kappa, int64_t norms, int64_t wide_norms,
                int64_t ok) {
                 if (!t.read_gradients(gradients, factors) || !t.read_operators(operators) ||
                     !t.read_parameters(parameters, gradients) || !t.read_momenta(momenta)) {
                     return false;
                 }
                 const py::buffer_info of_block = group_of_block.request(), of_part = group_of_part.request();
                 if (!t.read_groups(list_of(of_block), list_of(of_part), groups, rates)) {
                     return false;
                 }
                 t.read_steps(steps, on_device);
                 t.plan.theta_step(stream_at(stream), workspace,
                                   {t.gradients(), t.operators, t.momentum, t.steps, t.theta, t.rate_pointers, t.beta,
                                    t.base_lr, t.step, t.lr, t.decay, coefficients},
                                   after, times, static_cast<Normalize>(normalize), kappa, norms, wide_norms, ok);
                 return true;
             })
        .def("aux_loss",
             [](TensorPlan& t, int64_t stream, int64_t workspace, const py::list& gradients,
                const std::optional<py::list>& factors, const std::optional<py::list>& operators, const py::list& adam,
                const py::list& vs, const py::list& fvs, const py::list& steps, bool on_device, double damping,
                bool learn_scale, int64_t loss, int64_t alpha) {
                 if (!t.read_gradients(gradients, factors) || !t.read_operators(operators) || !t.read_adam(adam) ||
                     !t.read_dense(vs, t.v) || !t.read_dense(fvs, t.fv)) {
                     return false;
                 }
                 t.read_steps(steps, on_device);
                 t.plan.aux_loss(stream_at(stream), workspace,
                                 {t.gradients(), t.operators, t.adam, t.v, t.fv, t.steps}, damping, learn_scale, loss,
                                 alpha);
                 return true;
             })
        .def("aux_update",
             [](TensorPlan& t, int64_t stream, int64_t workspace, bool precondition, double lr, int64_t lr_pointer,
                double beta1, double beta2, double eps, int64_t ok) {
                 t.plan.aux_update(stream_at(stream), workspace, t.step, precondition, lr, lr_pointer, beta1, beta2,
                                   eps, ok);
             })
        .def("qv",
             [](TensorPlan& t, int64_t stream, int64_t workspace, const py::list& gradients,
                const std::optional<py::list>& factors, const std::optional<py::list>& operators, const py::list& outs) {
                 if (!t.read_gradients(gradients, factors) || !t.read_operators(operators) ||
                     !t.read_dense(outs, t.v)) {
                     return false;
                 }
                 t.plan.qv(stream_at(stream), workspace, t.gradients(), t.operators, t.v);
                 return true;
             })
        .def("refresh",
             [](TensorPlan& t, int64_t stream, const py::list& matrices) {
                 if (!t.read_factors(matrices)) {
                     return false;
                 }
                 t.plan.refresh(stream_at(stream), t.operators);
                 return true;
             })
        .def_property_readonly("counts_on_host", &TensorPlan::counts_on_host)
        .def("count_steps", &TensorPlan::count_steps);
    m.def("cuda_inner", [](int device, int64_t stream, const py::buffer& pointers, const py::buffer& counts,
                           const py::buffer& types, int64_t sums, int64_t more, int64_t out) {
        const py::buffer_info p = pointers.request(), c = counts.request(), t = types.request();
        inner(device, stream_at(stream), list_of(p), list_of(c), list_of(t), sums, more, out);
    });
    m.attr("cuda_tile_entries") = static_cast<int>(tile_entries);
}

}  // namespace fishleg
