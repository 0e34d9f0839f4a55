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

/// acc += A B of a tile, or BᵀAᵀ where ``mirrored``: of A B, as it is stored, the mirror image.
template <Precision precision, Layout layout>
__device__ __forceinline__ void tile_product(const Product& p, bool mirrored, float* shared, Accumulator& acc, int row,
                                             int column) {
    const Operand &A = p.operands[mirrored], &B = p.operands[!mirrored];
    constexpr bool a_transposed = layout == Layout::tn, b_transposed = layout == Layout::nt;
    const int warp = static_cast<int>(threadIdx.x) / warp_size, i = 32 * (warp / 2), j = 32 * (warp % 2);
    const auto copy = [&](int k, int stage) {
        float* a = shared + stage * 2 * operand;
        float* b = a + operand;
        if constexpr (a_transposed) {
            copy_tile<threads>(a, across_k, A.data, A.ld, depth, edge, k, row, p.K, p.M, A.aligned);
        } else {
            copy_tile<threads>(a, along_k, A.data, A.ld, edge, depth, row, k, p.M, p.K, A.aligned);
        }
        if constexpr (b_transposed) {
            copy_tile<threads>(b, along_k, B.data, B.ld, edge, depth, column, k, p.N, p.K, B.aligned);
        } else {
            copy_tile<threads>(b, across_k, B.data, B.ld, depth, edge, k, column, p.K, p.N, B.aligned);
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

/// ``doubled``: with plus_transpose.
template <Precision precision, bool doubled>
__global__ void __launch_bounds__(threads) products_kernel(const __grid_constant__ Table<Product> table) {
    FISHLEG_SHARED(float, shared);
    const Work<Product> work = work_of(table);
    const Product& p = work.item;
    int row, column;
    place(p, work.tile, row, column);
    row *= edge, column *= edge;
    Accumulator acc;
    clear(acc);
    if constexpr (doubled) {
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            if (p.layout == Layout::tn) {
                tile_product<precision, Layout::tn>(p, pass, shared, acc, row, column);
            } else {
                tile_product<precision, Layout::nt>(p, pass, shared, acc, row, column);
            }
        }
    } else {
        switch (p.layout) {
            case Layout::nn: tile_product<precision, Layout::nn>(p, false, shared, acc, row, column); break;
            case Layout::tn: tile_product<precision, Layout::tn>(p, false, shared, acc, row, column); break;
            case Layout::nt: tile_product<precision, Layout::nt>(p, false, shared, acc, row, column); break;
        }
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
    Sums* const scratch = reinterpret_cast<Sums*>(shared);
    if (p.clear && work.tile == 0 && threadIdx.x == 0) {
        *p.clear = 0;
    }
    if (!p.sums) {
        return;
    }
    write_sum(sums, scratch, p.sums + work.tile);
    if (p.arrivals && last_to_arrive(p.arrivals, p.tiles, scratch)) {
        const Sums all = total(p.sums, p.tiles, scratch);
        if (threadIdx.x == 0) {
            *p.norm = sqrt(all.a);
        }
    }
}

}  // namespace

int64_t tiles(Product& p) {
    const int64_t rows = (p.M + edge - 1) / edge;
    p.tiles_n = (p.N + edge - 1) / edge;
    const int64_t count = p.symmetric ? rows * (rows + 1) / 2 : rows * p.tiles_n;
    p.tiles = static_cast<int32_t>(count);
    return count;
}

void multiply_all(std::vector<Product>& products, Precision precision, Stream stream) {
    void (*const kernels[2][4])(Table<Product>) = {
        {products_kernel<Precision::ieee, false>, products_kernel<Precision::tf32x3, false>,
         products_kernel<Precision::tf32, false>, products_kernel<Precision::bf16, false>},
        {products_kernel<Precision::ieee, true>, products_kernel<Precision::tf32x3, true>,
         products_kernel<Precision::tf32, true>, products_kernel<Precision::bf16, true>},
    };
    const bool doubled = !products.empty() && products.front().plus_transpose;
    launch_all("products", kernels[doubled][static_cast<int>(precision)], products, [](Product& p) { return tiles(p); },
               threads, shared_bytes, stream);
}

}  // namespace fishleg::cuda
