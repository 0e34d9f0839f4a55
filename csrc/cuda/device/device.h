// What every kernel file needs of CUDA: launches, shared memory, deterministic sums.
//
// With FISHLEG_CUDA_ON_CPU the same kernels are compiled by a C++ compiler and run on the CPU (tests only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FISHLEG_CUDA_ON_CPU)
#include "tests/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include "cuda/tables.h"
#include "formulas.h"

namespace fishleg::cuda {

constexpr int warp_size = 32;

#if defined(FISHLEG_CUDA_ON_CPU)

template <class Table>
void launch(const char*, void (*kernel)(Table), int64_t grid, int threads, size_t shared, Stream, const Table& table) {
    if (grid > 0) {
        emulation::run([&] { kernel(table); }, grid, threads, shared);
    }
}

#else

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // reported: leave none for the next caller to find
        throw std::runtime_error(std::string("CUDA kernel ") + what + ": " + cudaGetErrorString(error));
    }
}

/// One launch of ``kernel`` with its table as a parameter by value. No blocks: no launch.
template <class Table>
void launch(const char* name, void (*kernel)(Table), int64_t grid, int threads, size_t shared, Stream stream,
            const Table& table) {
    if (grid <= 0) {
        return;
    }
    if (shared > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              name);
    }
    kernel<<<static_cast<unsigned>(grid), threads, shared, stream>>>(table);
    check(cudaGetLastError(), name);
}

#define FISHLEG_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char fishleg_shared[];   \
    T* const name = reinterpret_cast<T*>(fishleg_shared)

#endif

/// The most that a table of descriptors may hold, in bytes: kernel parameters may be 32 764 bytes since CUDA 12.1.
#if defined(FISHLEG_CUDA_ON_CPU) || CUDART_VERSION >= 12010
constexpr size_t table_bytes = 32000;
#else
constexpr size_t table_bytes = 4000;
#endif

/// Items of a launch, each of a number of tiles: a thread block works on one tile of one item.
template <class Item>
struct Table {
    static constexpr int capacity = static_cast<int>((table_bytes - 16) / sizeof(Item));
    int32_t count;
    int32_t tiles;
    Item items[capacity];
};

/// The item of a tile: the last whose ``first_tile`` is not beyond it.
template <class Item>
__device__ __forceinline__ int item_of(const Table<Item>& table, int tile) {
    int low = 0, high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.items[middle].first_tile <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ bool finite(double x) { return x - x == 0; }

__device__ __forceinline__ Sums operator+(Sums x, Sums y) { return {x.a + y.a, x.b + y.b, x.c + y.c}; }

__device__ __forceinline__ Sums shuffled(Sums x, int offset) {
    return {__shfl_down_sync(0xffffffffu, x.a, offset), __shfl_down_sync(0xffffffffu, x.b, offset),
            __shfl_down_sync(0xffffffffu, x.c, offset)};
}

/// Sum over the thread block, for thread 0. ``room``: shared memory for one Sums a warp, free to be overwritten.
__device__ __forceinline__ Sums block_sum(Sums mine, Sums* room) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        mine = mine + shuffled(mine, offset);
    }
    const int warps = static_cast<int>(blockDim.x) / warp_size, t = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (t % warp_size == 0) {
        room[t / warp_size] = mine;
    }
    __syncthreads();
    if (t == 0) {
        for (int w = 1; w < warps; ++w) {
            mine = mine + room[w];
        }
    }
    return mine;
}

}  // namespace fishleg::cuda
