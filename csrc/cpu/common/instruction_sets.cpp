// Which build this processor runs of what is compiled once for each instruction set: step/kernels.cpp and
// anchor/tile_inverse_root.cpp.
#include "cpu/anchor/tile_inverse_root.h"
#include "cpu/step/kernels.h"

namespace fishleg::cpu {

#define FISHLEG_DECLARE(isa)                  \
    namespace isa {                           \
    extern const Kernels float32_kernels;     \
    extern const Kernels float64_kernels;     \
    bool tile_inverse_root(float*, float*);   \
    }
FISHLEG_DECLARE(baseline)
#ifdef FISHLEG_X86_LEVELS
FISHLEG_DECLARE(x86_64_v3)
FISHLEG_DECLARE(x86_64_v4)
#endif

const Kernels& kernels(Dtype dtype) {
    const bool wide = dtype == Dtype::float64;
#ifdef FISHLEG_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) return wide ? x86_64_v4::float64_kernels : x86_64_v4::float32_kernels;
    if (__builtin_cpu_supports("x86-64-v3")) return wide ? x86_64_v3::float64_kernels : x86_64_v3::float32_kernels;
#endif
    return wide ? baseline::float64_kernels : baseline::float32_kernels;
}

bool (*tile_inverse_root())(float* a, float* x) {
#ifdef FISHLEG_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) return x86_64_v4::tile_inverse_root;
    if (__builtin_cpu_supports("x86-64-v3")) return x86_64_v3::tile_inverse_root;
#endif
    return baseline::tile_inverse_root;
}

}  // namespace fishleg::cpu
