// Q u of small blocks, P X S at once: a thread block makes 32 rows of P X and keeps them in shared memory for the
// product with S. No intermediate result goes to memory.
#include "cuda/launch.h"
#include "cuda/device/products.h"
#include "cuda/device/tile.h"

namespace fishleg::cuda {
namespace {

constexpr int rows = 32, depth = 16, warps = chain_width / 32, threads = 32 * warps;
constexpr int a_ld = depth + 4;  // leading dimensions as in products.cu: no bank conflicts
constexpr int a_floats = rows * a_ld;

constexpr int width(int n) { return (n + 31) / 32 * 32; }
constexpr int floats(int w) { return 2 * a_floats + 2 * depth * (w + 8) + rows * (w + 4); }
static_assert(floats(chain_width) * sizeof(float) <= 99 * 1024);  // the least of any sm_80 … sm_120

template <Precision precision>
__global__ void __launch_bounds__(threads) chain_kernel(const __grid_constant__ Table<Chain> table) {
    FISHLEG_SHARED(float, shared);
    const int number = static_cast<int>(blockIdx.x);
    const Chain& c = table.items[item_of(table, number)];
    const int tile = number - c.first_tile, row = tile * rows, w = (c.n + 31) / 32 * 32;
    const int b_ld = w + 8, t_ld = w + 4;
    float* const a_room = shared;
    float* const b_room = a_room + 2 * a_floats;
    float* const T = b_room + 2 * depth * b_ld;
    const int column = static_cast<int>(threadIdx.x) / warp_size * 32;
    const bool busy = column < w;  // this warp has columns

    Accumulator acc;
    clear(acc);
    const auto copy = [&](int k, int stage) {
        copy_tile<threads>(a_room + stage * a_floats, a_ld, c.P, c.ldp, rows, depth, row, k, c.m, c.m, c.aligned_p);
        copy_tile<threads>(b_room + stage * depth * b_ld, b_ld, c.X, c.ld, depth, w, k, 0, c.m, c.n, true);
        commit_copies();
    };
    copy(0, 0);
    for (int k = 0, stage = 0; k < c.m; k += depth, stage ^= 1) {
        if (k + depth < c.m) {
            copy(k + depth, stage ^ 1);
            await_copies<1>();
        } else {
            await_copies<0>();
        }
        __syncthreads();
        if (busy) {
            multiply<precision, depth>(acc, a_room + stage * a_floats, a_ld, 1,
                                       b_room + stage * depth * b_ld + column, b_ld, 1);
        }
        __syncthreads();
    }
    const auto copy_s = [&](int k, int stage) {
        copy_tile<threads>(b_room + stage * depth * b_ld, b_ld, c.S, c.lds, depth, w, k, 0, c.n, c.n, c.aligned_s);
        commit_copies();
    };
    copy_s(0, 0);
    if (busy) {  // columns past n are zero, as X's are
        each(acc, [&](int i, int j, float value) { T[i * t_ld + column + j] = value; });
    }
    clear(acc);
    for (int k = 0, stage = 0; k < c.n; k += depth, stage ^= 1) {
        if (k + depth < c.n) {
            copy_s(k + depth, stage ^ 1);
            await_copies<1>();
        } else {
            await_copies<0>();
        }
        __syncthreads();
        if (busy) {
            multiply<precision, depth>(acc, T + k, t_ld, 1, b_room + stage * depth * b_ld + column, b_ld, 1);
        }
        __syncthreads();
    }
    Sums sums{};
    if (busy) {
        each(acc, [&](int i, int j, float value) {
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
    }
    if (c.sums) {
        sums = block_sum(sums, reinterpret_cast<Sums*>(shared));
        if (threadIdx.x == 0) {
            c.sums[tile] = sums;
        }
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
