#pragma once

#include <pybind11/pybind11.h>

namespace fishleg::cpu {

/// Each adds to the module.
void bind_anchor(pybind11::module_& m);
void bind_products(pybind11::module_& m);
void bind(pybind11::module_& m);

}  // namespace fishleg::cpu
