// Plans of CUDA kernels (cuda/host/plan.h): pointers and streams are integers, lists of them arrays of 64-bit numbers.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <cstring>

#include "cuda/host/plan.h"

namespace py = pybind11;

namespace fishleg {

using namespace cuda;

namespace {

Stream stream_at(int64_t stream) { return reinterpret_cast<Stream>(stream); }

/// A list of numbers from array.array("q") or ("d"); it has to outlive the span.
template <class T>
std::span<const T> list_of(const py::buffer_info& info) {
    if (info.ndim != 1 || info.itemsize != sizeof(T) || info.strides[0] != sizeof(T)) {
        throw py::type_error("an array of 64-bit numbers is needed");
    }
    return {static_cast<const T*>(info.ptr), static_cast<size_t>(info.shape[0])};
}

using PartTuple = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int, int, int64_t>;
using BlockTuple = std::tuple<std::string, int, int, int64_t, int64_t, int, std::vector<PartTuple>, bool>;

Plan make_plan(int op, const std::vector<BlockTuple>& tuples, int device) {
    std::vector<BlockLayout> blocks;
    for (const auto& [name, kind, precision, m, n, axis, parts, flat] : tuples) {
        BlockLayout b{name, static_cast<Kind>(kind), static_cast<Precision>(precision), m, n, axis, {}, flat};
        for (const auto& [shape, theta_strides, g_strides, theta_type, g_type, offset] : parts) {
            b.parts.push_back({shape, theta_strides, g_strides, static_cast<Type>(theta_type),
                               static_cast<Type>(g_type), offset});
        }
        blocks.push_back(std::move(b));
    }
    return Plan(static_cast<Op>(op), std::move(blocks), device);
}

}  // namespace

void bind_cuda(py::module_& m) {
    // Local: tests load a second module with it, whose kernels run on the CPU.
    py::class_<Plan>(m, "CudaPlan", py::module_local(),
                     "What one op needs to know of a list of blocks; see csrc/cuda/host/plan.h.")
        .def(py::init(&make_plan), py::arg("op"), py::arg("blocks"), py::arg("device"))
        .def_readonly("workspace_bytes", &Plan::workspace_bytes)
        .def_readonly("external", &Plan::external)
        .def_readonly("external_2", &Plan::external_2)
        .def_readonly("scales", &Plan::scales)
        .def("polar", &Plan::polar)
        .def("theta_step",
             [](Plan& plan, int64_t stream, int64_t workspace, const py::buffer& pointers, const py::buffer& numbers,
                bool after, int times, int normalize, double kappa, int64_t norms, int64_t wide_norms, int64_t ok) {
                 const py::buffer_info p = pointers.request(), n = numbers.request();
                 plan.theta_step(stream_at(stream), workspace, list_of<int64_t>(p), list_of<double>(n), after, times,
                                 static_cast<Normalize>(normalize), kappa, norms, wide_norms, ok);
             })
        .def("aux_loss",
             [](Plan& plan, int64_t stream, int64_t workspace, const py::buffer& pointers, double damping,
                bool learn_scale, int64_t loss, int64_t alpha) {
                 const py::buffer_info p = pointers.request();
                 plan.aux_loss(stream_at(stream), workspace, list_of<int64_t>(p), damping, learn_scale, loss, alpha);
             })
        .def("aux_update",
             [](Plan& plan, int64_t stream, int64_t workspace, const py::buffer& steps, double damping,
                bool precondition, double lr, int64_t lr_pointer, double beta1, double beta2, double eps, int64_t ok) {
                 const py::buffer_info s = steps.request();
                 plan.aux_update(stream_at(stream), workspace, list_of<double>(s), damping, precondition, lr,
                                 lr_pointer, beta1, beta2, eps, ok);
             })
        .def("qv",
             [](Plan& plan, int64_t stream, int64_t workspace, const py::buffer& pointers) {
                 const py::buffer_info p = pointers.request();
                 plan.qv(stream_at(stream), workspace, list_of<int64_t>(p));
             })
        .def("refresh", [](Plan& plan, int64_t stream, const py::buffer& pointers) {
            const py::buffer_info p = pointers.request();
            plan.refresh(stream_at(stream), list_of<int64_t>(p));
        });
    m.def("cuda_inner", [](int device, int64_t stream, const py::buffer& pointers, const py::buffer& counts,
                           const py::buffer& types, int64_t sums, int64_t more, int64_t out) {
        const py::buffer_info p = pointers.request(), c = counts.request(), t = types.request();
        inner(device, stream_at(stream), list_of<int64_t>(p), list_of<int64_t>(c), list_of<int64_t>(t), sums, more,
              out);
    });
    m.attr("cuda_tile_entries") = static_cast<int>(tile_entries);
}

}  // namespace fishleg
