// What the files of this folder share. Each binds one part of the library, and does nothing else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fishleg {

/// Pointers come from Python as integers, as torch.Tensor.data_ptr() gives them.
template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// Each adds to the module.
void bind_anchor(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);  // in a build with CUDA
void bind_denormals(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_places(pybind11::module_& m);
void bind_step(pybind11::module_& m);

}  // namespace fishleg
