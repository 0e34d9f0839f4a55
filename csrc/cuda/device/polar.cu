// The first step towards polar factors: how large A² is decides what all is divided by (tables.h).
#include "cuda/device/device.h"
#include "cuda/device/products.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr int threads = 256;

/// Every thread block adds up all sums, in the same order, for its tile of B.
__global__ void __launch_bounds__(threads) first_step_kernel(const __grid_constant__ Table<FirstStep> table) {
    FISHLEG_SHARED(Sums, shared);
    const Work<FirstStep> work = work_of(table);
    const FirstStep& s = work.item;
    const int t = static_cast<int>(threadIdx.x);
    Sums sums{};
    for (int i = t; i < s.count; i += threads) {
        sums = sums + s.sums[i];
    }
    sums = block_sum(sums, shared);
    __syncthreads();
    if (t == 0) {
        shared->a = sums.a > 0 ? sqrt(sqrt(sums.a)) : 1;
    }
    __syncthreads();
    const double bound = shared->a, scale = 1 / sqrt(bound);
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
               threads, threads / warp_size * sizeof(Sums), stream);
}

}  // namespace fishleg::cuda
