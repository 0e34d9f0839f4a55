// Denormal numbers as zeros (cpu/common/denormals.h).
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cpu/common/denormals.h"

namespace py = pybind11;

namespace fishleg {

void bind_denormals(py::module_& m) {
    m.def("can_flush_denormals", &cpu::can_flush_denormals);
    m.def("flush_denormals", &cpu::flush_denormals, py::arg("threads"),
          "Count denormal numbers as zero on this thread and OpenMP's others; returns their settings before.");
    m.def("restore_denormals", &cpu::restore_denormals, py::arg("settings"));
}

}  // namespace fishleg
