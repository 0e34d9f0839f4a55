// Q u of small blocks, P X S at once: a thread block makes 32 rows of P X and keeps them in shared memory for the
// product with S. No intermediate result goes to memory.
#include "cuda/device/products.h"
#include "cuda/device/tile.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr int rows = 32, depth = 16, warps = chain_width / 32, threads = 32 * warps;
constexpr int a_ld = depth + 4;  // leading dimensions as in products.cu: no bank conflicts
constexpr int a_floats = rows * a_ld;

constexpr int width(int n) { return (n + 31) / 32 * 32; }
constexpr int floats(int w) { return 2 * a_floats + 2 * depth * (w + 8) + rows * (w + 4); }
static_assert(floats(chain_width) * sizeof(float) <= 99 * 1024);  // the least of any sm_80 … sm_120

/// A warp's 32×32 of outer∘(P X S), from ``row`` and ``column`` on, to memory; returns its sums.
__device__ __forceinline__ Sums store(const Chain& c, const Accumulator& acc, int row, int column) {
    Sums sums{};
    for_each_entry(acc, [&](int i, int j, float value) {
        i += row, j += column;
        if (i >= c.m || j >= c.n) {
            return;
        }
        sums.b += static_cast<double>(c.X[static_cast<int64_t>(i) * c.ld + j]) * value;
        if (c.outer) {
            value *= c.outer[static_cast<int64_t>(i) * c.n + j];
        }
        sums.a += static_cast<double>(value) * value;
        c.C[static_cast<int64_t>(i) * c.ldc + j] = value;
    });
    return sums;
}

template <Precision precision>
__global__ void __launch_bounds__(threads) chain_kernel(const __grid_constant__ Table<Chain> table) {
    FISHLEG_SHARED(float, shared);
    const Work<Chain> work = work_of(table);
    const Chain& c = work.item;
    const int row = work.tile * rows, w = (c.n + 31) / 32 * 32;
    const int b_ld = w + 8, t_ld = w + 4;
    float* const a_tiles = shared;  // two each
    float* const b_tiles = a_tiles + 2 * a_floats;
    float* const T = b_tiles + 2 * depth * b_ld;
    const int column = static_cast<int>(threadIdx.x) / warp_size * 32;
    const bool busy = column < w;  // this warp has columns

    Accumulator acc;
    clear(acc);
    const auto copy = [&](int k, int stage) {
        copy_tile<threads>(a_tiles + stage * a_floats, a_ld, c.P, c.ldp, rows, depth, row, k, c.m, c.m, c.aligned_p);
        copy_tile<threads>(b_tiles + stage * depth * b_ld, b_ld, c.X, c.ld, depth, w, k, 0, c.m, c.n, true);
        commit_copies();
    };
    copy(0, 0);
    double_buffered<depth>(c.m, copy, [&](int, int stage) {
        if (busy) {
            multiply<precision, depth>(acc, a_tiles + stage * a_floats, a_ld, 1,
                                       b_tiles + stage * depth * b_ld + column, b_ld, 1);
        }
    });
    const auto copy_s = [&](int k, int stage) {
        copy_tile<threads>(b_tiles + stage * depth * b_ld, b_ld, c.S, c.lds, depth, w, k, 0, c.n, c.n, c.aligned_s);
        commit_copies();
    };
    copy_s(0, 0);
    if (busy) {  // columns past n are zero, as X's are
        for_each_entry(acc, [&](int i, int j, float value) { T[i * t_ld + column + j] = value; });
    }
    clear(acc);
    double_buffered<depth>(c.n, copy_s, [&](int k, int stage) {
        if (busy) {
            multiply<precision, depth>(acc, T + k, t_ld, 1, b_tiles + stage * depth * b_ld + column, b_ld, 1);
        }
    });
    const Sums sums = busy ? store(c, acc, row, column) : Sums{};
    if (c.sums) {
        write_sum(sums, reinterpret_cast<Sums*>(shared), c.sums + work.tile);
    }
}

}  // namespace

int64_t tiles(Chain& c) { return c.n == 0 ? 0 : (c.m + rows - 1) / rows; }

void chain_all(std::vector<Chain>& chains, Precision precision, Stream stream) {
    void (*const kernels[])(Table<Chain>) = {
        chain_kernel<Precision::ieee>,
        chain_kernel<Precision::tf32x3>,
        chain_kernel<Precision::tf32>,
        chain_kernel<Precision::bf16>,
    };
    int widest = 0;
    for (const Chain& c : chains) {
        widest = width(c.n) > widest ? width(c.n) : widest;
    }
    launch_all("chain", kernels[static_cast<int>(precision)], chains, [](Chain& c) { return tiles(c); }, threads,
               floats(widest) * sizeof(float), stream);
}

}  // namespace fishleg::cuda
