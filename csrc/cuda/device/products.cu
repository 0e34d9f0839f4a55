// Grouped matrix products: all of a step's in one launch, in tiles of 64×64 over 32 from double-buffered shared memory.
#include "cuda/device/products.h"

#include "cuda/device/tile.h"
#include "cuda/launch.h"

namespace fishleg::cuda {
namespace {

constexpr int edge = 64, depth = 32, threads = 128;
// Leading dimensions in shared memory that keep a warp's reads of fragments free of bank conflicts.
constexpr int along_k = depth + 4, across_k = edge + 8;
constexpr int operand = edge * along_k;  // floats: as many as depth·across_k
static_assert(operand == depth * across_k);
constexpr size_t shared_bytes = 2 * 2 * operand * sizeof(float);

template <Precision precision, Layout layout>
__device__ __forceinline__ void tile_product(const Product& p, float* shared, Accumulator& acc, int row, int column) {
    constexpr bool a_transposed = layout == Layout::tn, b_transposed = layout == Layout::nt;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, i = 32 * (warp / 2), j = 32 * (warp % 2);
    const auto copy = [&](int k, int stage) {
        float* a = shared + stage * 2 * operand;
        float* b = a + operand;
        if constexpr (a_transposed) {
            copy_tile<threads>(a, across_k, p.A, p.lda, depth, edge, k, row, p.K, p.M, p.aligned_a);
        } else {
            copy_tile<threads>(a, along_k, p.A, p.lda, edge, depth, row, k, p.M, p.K, p.aligned_a);
        }
        if constexpr (b_transposed) {
            copy_tile<threads>(b, along_k, p.B, p.ldb, edge, depth, column, k, p.N, p.K, p.aligned_b);
        } else {
            copy_tile<threads>(b, across_k, p.B, p.ldb, depth, edge, k, column, p.K, p.N, p.aligned_b);
        }
        commit_copies();
    };
    constexpr int a_row = a_transposed ? 1 : along_k, a_k = a_transposed ? across_k : 1;
    constexpr int b_k = b_transposed ? 1 : across_k, b_column = b_transposed ? along_k : 1;
    if (p.K > 0) {
        copy(0, 0);
    }
    double_buffered<depth>(p.K, copy, [&](int, int stage) {
        const float* a = shared + stage * 2 * operand;
        multiply<precision, depth>(acc, a + i * a_row, a_row, a_k, a + operand + j * b_column, b_k, b_column);
    });
}

/// Row and column of a tile; of a symmetric product the tiles on and right of the diagonal, by columns.
__device__ __forceinline__ void place(const Product& p, int tile, int& row, int& column) {
    if (!p.symmetric) {
        row = tile / p.tiles_n, column = tile % p.tiles_n;
        return;
    }
    column = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) / 2.0f);
    while (column * (column + 1) / 2 > tile) {
        --column;
    }
    while ((column + 1) * (column + 2) / 2 <= tile) {
        ++column;
    }
    row = tile - column * (column + 1) / 2;
}

template <Precision precision>
__global__ void __launch_bounds__(threads) products_kernel(const __grid_constant__ Table<Product> table) {
    FISHLEG_SHARED(float, shared);
    const Work<Product> work = work_of(table);
    const Product& p = work.item;
    int row, column;
    place(p, work.tile, row, column);
    row *= edge, column *= edge;
    Accumulator acc;
    clear(acc);
    switch (p.layout) {
        case Layout::nn: tile_product<precision, Layout::nn>(p, shared, acc, row, column); break;
        case Layout::tn: tile_product<precision, Layout::tn>(p, shared, acc, row, column); break;
        case Layout::nt: tile_product<precision, Layout::nt>(p, shared, acc, row, column); break;
    }
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    row += 32 * (warp / 2), column += 32 * (warp % 2);
    const float scale = p.add_scale ? *p.add_scale : 1;
    Sums sums{};
    for_each_entry(acc, [&](int i, int j, float value) {
        i += row, j += column;
        if (i >= p.M || j >= p.N || (p.symmetric && j < i)) {
            return;
        }
        const int64_t at = static_cast<int64_t>(i) * p.ldc + j;
        if (p.pair) {
            sums.b += static_cast<double>(p.pair[at]) * value;
        }
        if (p.outer) {
            value *= p.outer[static_cast<int64_t>(i) * p.N + j];
        }
        if (p.add) {
            value = p.times * value + p.add_times * scale * p.add[at];
        }
        sums.a += static_cast<double>(value) * value * (p.symmetric && j > i ? 2 : 1);
        p.C[at] = value;
        if (p.symmetric) {
            p.C[static_cast<int64_t>(j) * p.ldc + i] = value;
        }
    });
    if (p.sums) {
        write_sum(sums, reinterpret_cast<Sums*>(shared), p.sums + work.tile);
    }
}

}  // namespace

int64_t tiles(Product& p) {
    const int64_t rows = (p.M + edge - 1) / edge;
    p.tiles_n = (p.N + edge - 1) / edge;
    return p.symmetric ? rows * (rows + 1) / 2 : rows * p.tiles_n;
}

void multiply_all(std::vector<Product>& products, Precision precision, Stream stream) {
    void (*const kernels[])(Table<Product>) = {
        products_kernel<Precision::ieee>,
        products_kernel<Precision::tf32x3>,
        products_kernel<Precision::tf32>,
        products_kernel<Precision::bf16>,
    };
    launch_all("products", kernels[static_cast<int>(precision)], products, [](Product& p) { return tiles(p); }, threads,
               shared_bytes, stream);
}

}  // namespace fishleg::cuda
