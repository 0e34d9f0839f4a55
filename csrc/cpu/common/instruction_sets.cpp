// Which build of the kernels this processor runs.
#include "cpu/step/kernels.h"
#include "cpu/anchor/tile_inverse_root.h"

namespace fishleg::cpu {

#define FISHLEG_DECLARE(isa)                  \
    namespace isa {                           \
    extern const Kernels single, twofold;     \
    bool leaf(float* a, float* x);            \
    }
FISHLEG_DECLARE(baseline)
#ifdef FISHLEG_X86_LEVELS
FISHLEG_DECLARE(x86_64_v3)
FISHLEG_DECLARE(x86_64_v4)
#endif

const Kernels& kernels(Dtype dtype) {
    const bool wide = dtype == Dtype::float64;
#ifdef FISHLEG_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) return wide ? x86_64_v4::twofold : x86_64_v4::single;
    if (__builtin_cpu_supports("x86-64-v3")) return wide ? x86_64_v3::twofold : x86_64_v3::single;
#endif
    return wide ? baseline::twofold : baseline::single;
}

bool (*leaf())(float* a, float* x) {
#ifdef FISHLEG_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4")) return x86_64_v4::leaf;
    if (__builtin_cpu_supports("x86-64-v3")) return x86_64_v3::leaf;
#endif
    return baseline::leaf;
}

}  // namespace fishleg::cpu
