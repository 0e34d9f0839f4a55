// What every kernel file needs: shared memory, a thread block's work, sums in an order that is always the same.
#pragma once

#include "cuda/launch.h"
#include "formulas.h"

namespace fishleg::cuda {

constexpr int warp_size = 32;

#if !defined(FISHLEG_CUDA_ON_CPU)  // which has its own
#define FISHLEG_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char fishleg_shared[];   \
    T* const name = reinterpret_cast<T*>(fishleg_shared)
#endif

/// The item of a tile: the last whose ``first_tile`` is not beyond it.
template <class Table>
__device__ __forceinline__ int item_of(const Table& table, int tile) {
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

/// What a thread block works on.
template <class Item>
struct Work {
    const Item& item;
    int tile;  // of the item's
};

template <class Item>
__device__ __forceinline__ Work<Item> work_of(const Table<Item>& table) {
    const int number = static_cast<int>(blockIdx.x);
    const Item& item = table.items[item_of(table, number)];
    return {item, number - item.first_tile};
}

/// The same of a part.
template <class Item>
struct PartWork {
    const Item& item;
    const Strides& strides;
    int tile;
};

template <class Item>
__device__ __forceinline__ PartWork<Item> work_of(const PartTable<Item>& table) {
    const int number = static_cast<int>(blockIdx.x);
    const Item& item = table.items[item_of(table, number)];
    return {item, table.strides[item.strides], number - item.first_tile};
}

__device__ __forceinline__ bool finite(double x) { return x - x == 0; }

__device__ __forceinline__ Sums operator+(Sums x, Sums y) { return {x.a + y.a, x.b + y.b, x.c + y.c}; }

__device__ __forceinline__ Sums shuffled(Sums x, int offset) {
    return {__shfl_down_sync(0xffffffffu, x.a, offset), __shfl_down_sync(0xffffffffu, x.b, offset),
            __shfl_down_sync(0xffffffffu, x.c, offset)};
}

/// Sum over the thread block, for thread 0. ``scratch``: shared memory for one Sums a warp, free to be overwritten.
__device__ __forceinline__ Sums block_sum(Sums mine, Sums* scratch) {
#pragma unroll
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        mine = mine + shuffled(mine, offset);
    }
    const int warps = static_cast<int>(blockDim.x) / warp_size, t = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (t % warp_size == 0) {
        scratch[t / warp_size] = mine;
    }
    __syncthreads();
    if (t == 0) {
        for (int w = 1; w < warps; ++w) {
            mine = mine + scratch[w];
        }
    }
    return mine;
}

/// ``count`` sums added up by one thread block, for thread 0.
__device__ __forceinline__ Sums total(const Sums* sums, int64_t count, Sums* scratch) {
    Sums mine{};
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        mine = mine + sums[i];
    }
    return block_sum(mine, scratch);
}

/// Sum over the thread block into ``to``.
__device__ __forceinline__ void write_sum(Sums mine, Sums* scratch, Sums* to) {
    mine = block_sum(mine, scratch);
    if (threadIdx.x == 0) {
        *to = mine;
    }
}

/// Whether this thread block is the last of ``count`` to come here, which then sees all that the others wrote before.
/// ``arrivals`` is zero before the first does. ``scratch``: shared memory, free to be overwritten.
__device__ __forceinline__ bool last_to_arrive(int32_t* arrivals, int count, void* scratch) {
    int32_t* const before = static_cast<int32_t*>(scratch);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *before = atomicAdd(arrivals, 1);
        __threadfence();
    }
    __syncthreads();
    const bool last = *before == count - 1;
    __syncthreads();
    return last;
}

}  // namespace fishleg::cuda
