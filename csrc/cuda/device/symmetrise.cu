// M ← M + Mᵀ in place: a thread block adds a 32×32 tile and its mirror image.
#include "cuda/device/device.h"
#include "cuda/device/products.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr int edge = 32, threads = 256, tile_ld = edge + 1;

__global__ void __launch_bounds__(threads) symmetrise_kernel(const __grid_constant__ Table<Square> table) {
    FISHLEG_SHARED(float, shared);
    const Work<Square> work = work_of(table);
    const Square& s = work.item;
    const int across = (s.n + edge - 1) / edge, tile = work.tile;
    const int row = tile / across * edge, column = tile % across * edge;
    if (column < row) {  // its mirror image does the work
        return;
    }
    float* const here = shared;
    float* const there = shared + edge * tile_ld;
    const int j = static_cast<int>(threadIdx.x) % edge, first = static_cast<int>(threadIdx.x) / edge;
    for (int i = first; i < edge; i += threads / edge) {
        const bool in = row + i < s.n && column + j < s.n, mirrored = column + i < s.n && row + j < s.n;
        here[i * tile_ld + j] = in ? s.M[static_cast<int64_t>(row + i) * s.ld + column + j] : 0;
        there[i * tile_ld + j] = mirrored ? s.M[static_cast<int64_t>(column + i) * s.ld + row + j] : 0;
    }
    __syncthreads();
    for (int i = first; i < edge; i += threads / edge) {
        if (row + i < s.n && column + j < s.n) {
            s.M[static_cast<int64_t>(row + i) * s.ld + column + j] = here[i * tile_ld + j] + there[j * tile_ld + i];
        }
        if (column + i < s.n && row + j < s.n) {  // on the diagonal: the same value again
            s.M[static_cast<int64_t>(column + i) * s.ld + row + j] = there[i * tile_ld + j] + here[j * tile_ld + i];
        }
    }
}

}  // namespace

int64_t tiles(Square& s) {
    const int64_t across = (s.n + edge - 1) / edge;
    return across * across;
}

void symmetrise_all(std::vector<Square>& squares, Stream stream) {
    launch_all("symmetrise", symmetrise_kernel, squares, [](Square& s) { return tiles(s); }, threads,
               2 * edge * tile_ld * sizeof(float), stream);
}

}  // namespace fishleg::cuda
