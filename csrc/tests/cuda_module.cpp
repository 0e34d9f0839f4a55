// Python module _cuda_on_cpu: the CUDA plan with its kernels run on the CPU (cuda_on_cpu.h), for tests.
#include "bindings/bindings.h"
#include "tests/cuda_on_cpu.h"

PYBIND11_MODULE(_cuda_on_cpu, m) {
    fishleg::bind_cuda(m);
    m.def("launches", [] { return fishleg::emulation::launches(); }, "Launches of kernels so far.");
}
