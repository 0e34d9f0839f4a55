// Launches: kernels get a table of items by value, and a list of any length takes as many launches as it fills tables.
//
// With FISHLEG_CUDA_ON_CPU the same kernels are compiled by a C++ compiler and run on the CPU (tests only).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(FISHLEG_CUDA_ON_CPU)
#include "tests/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include "cuda/tables.h"

namespace fishleg::cuda {

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

/// ``tiles(item)`` says how many thread blocks an item needs. The items' ``first_tile`` is filled in.
template <class Item, class Tiles>
void launch_all(const char* name, void (*kernel)(Table<Item>), std::vector<Item>& items, Tiles tiles, int threads,
                size_t shared, Stream stream) {
    static_assert(sizeof(Table<Item>) <= table_bytes);
    Table<Item> table;
    table.count = table.tiles = 0;
    const auto flush = [&] {
        launch(name, kernel, table.tiles, threads, shared, stream, table);
        table.count = table.tiles = 0;
    };
    for (Item& item : items) {
        const int64_t needed = tiles(item);
        if (needed == 0) {
            continue;
        }
        if (table.count == Table<Item>::capacity || table.tiles + needed > INT32_MAX) {
            flush();
        }
        item.first_tile = table.tiles;
        table.items[table.count++] = item;
        table.tiles += static_cast<int32_t>(needed);
    }
    flush();
}

}  // namespace fishleg::cuda
