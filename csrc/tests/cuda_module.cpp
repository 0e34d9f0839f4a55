// Python module _cuda_on_cpu: the CUDA plan with its kernels run on the CPU (cuda_on_cpu.h), for tests; or _cuda_stubbed,
// whose launches are only counted.
#include "bindings/bindings.h"
#include "tests/cuda_on_cpu.h"

#if defined(FISHLEG_CUDA_STUBBED)
#define FISHLEG_MODULE _cuda_stubbed
#else
#define FISHLEG_MODULE _cuda_on_cpu
#endif

PYBIND11_MODULE(FISHLEG_MODULE, m) {
    fishleg::bind_cuda(m);
    fishleg::bind_places(m);
    m.def("launches", [] { return fishleg::emulation::launches(); }, "Launches of kernels so far.");
    m.def("last_launch", [] { return fishleg::emulation::last_launch(); },
          "When the latest was, in seconds of the monotonic clock; where launches are stubbed.");
}
