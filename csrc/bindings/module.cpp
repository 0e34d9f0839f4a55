// Python module fishleg_fast._native, whose face is fishleg_fast/native.py.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "build_info.h"
#include "cuda/host/device_status.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled part of fishleg_fast; not for use from outside the package.";
    m.attr("__version__") = fishleg::build::version;

    m.def("features", [] {
        py::dict features;
        features["cuda"] = *fishleg::build::cuda_compiler != '\0';
        features["compiler"] = fishleg::build::compiler;
        features["cuda_compiler"] = fishleg::build::cuda_compiler;
        return features;
    }, "What was compiled in: cuda (bool), compiler, cuda_compiler (empty without CUDA).");

    m.def("cuda_status", [] {
        const fishleg::DeviceStatus status = fishleg::device_status();
        return py::make_tuple(status.devices > 0, status.detail);
    }, "(whether a CUDA device can be used, what was found or why not).");

    fishleg::bind_step(m);
    fishleg::bind_anchor(m);
    fishleg::bind_denormals(m);
    fishleg::bind_gemm(m);
    fishleg::bind_places(m);
#if defined(FISHLEG_WITH_CUDA)
    fishleg::bind_cuda(m);
#endif
}
