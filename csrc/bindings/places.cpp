// Lists of tensors and other objects that launchers of kernels look at at every step.
#include "bindings/bindings.h"
#include "bindings/lists.h"
#include "bindings/tensors.h"

#include <string>

namespace py = pybind11;

namespace fishleg {

namespace {

/// (addresses, strides and types as bytes), or None where one is no tensor that strides describe.
py::object tensor_places(const py::list& tensors) {
    const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
    py::list addresses(count);
    std::string lie;
    lie.reserve(static_cast<size_t>(count) * 32);
    TensorView t;
    for (Py_ssize_t k = 0; k < count; ++k) {
        if (!view_of(PyList_GET_ITEM(tensors.ptr(), k), t)) {
            return py::none();
        }
        PyList_SET_ITEM(addresses.ptr(), k, PyLong_FromLongLong(t.address()));
        const int32_t kind[] = {t.device_type, t.device_id, t.ndim, t.code << 8 | t.bits};
        lie.append(reinterpret_cast<const char*>(kind), sizeof kind);
        lie.append(reinterpret_cast<const char*>(t.strides), sizeof(int64_t) * static_cast<size_t>(t.ndim));
    }
    return py::make_tuple(addresses, py::bytes(lie));
}

}  // namespace

void bind_places(py::module_& m) {
    m.def("tensor_places", &tensor_places, py::arg("tensors"),
          "(addresses of the tensors, what has to be the same for them to lie alike), or None.");
    py::class_<Versions>(m, "Versions", py::module_local(), "Tensors' counters of what was written to them.")
        .def(py::init())
        .def("moved", &Versions::moved)
        .def("forget", &Versions::forget);
    m.def("flattened", &flattened, "All that is in an attribute of each object, a list or a dict's values.");
    m.def("objects", &objects, "What plans depend on of blocks, in one list.", py::arg("blocks"), py::arg("learning"));
    m.def("has_objects", &has_objects, "Whether blocks have the very objects of such a list.", py::arg("blocks"),
          py::arg("learning"), py::arg("known"));
    m.def("identical", &identical, "Whether two lists have the same objects in the same order.");
}

}  // namespace fishleg
