// The first step towards polar factors: how large A² is decides what all is divided by (tables.h).
#include "cuda/device/device.h"
#include "cuda/device/products.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) first_step_kernel(const __grid_constant__ Table<FirstStep> table) {
    const Work<FirstStep> work = work_of(table);
    const FirstStep& s = work.item;
    const int t = static_cast<int>(threadIdx.x);
    const double bound = *s.norm > 0 ? sqrt(*s.norm) : 1, scale = 1 / sqrt(bound);
    if (t == 0 && work.tile == 0) {
        *s.scale = static_cast<float>(scale);
    }
    const float linear = static_cast<float>(s.linear / bound * scale);
    const float quadratic = static_cast<float>(s.quadratic / (bound * bound) * scale);
    const int64_t first = static_cast<int64_t>(work.tile) * tile_entries;
    const int64_t last = first + tile_entries, end = static_cast<int64_t>(s.n) * s.n;
    for (int64_t entry = first + t; entry < (last < end ? last : end); entry += threads) {
        const int64_t at = entry / s.n * s.ld + entry % s.n;
        s.B[at] = linear * s.A[at] + quadratic * s.B[at];
    }
}

}  // namespace

void first_step_all(std::vector<FirstStep>& steps, Stream stream) {
    launch_all("first_step", first_step_kernel, steps,
               [](const FirstStep& s) { return (static_cast<int64_t>(s.n) * s.n + tile_entries - 1) / tile_entries; },
               threads, 0, stream);
}

}  // namespace fishleg::cuda
