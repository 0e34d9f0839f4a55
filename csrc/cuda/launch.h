// Launches: kernels get a table of items by value, and a list of any length takes as many launches as it fills tables.
//
// With FISHLEG_CUDA_ON_CPU the same kernels are compiled by a C++ compiler and run on the CPU (tests only); with
// FISHLEG_CUDA_STUBBED besides, a launch is only counted, so that what the host does can be timed.
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

#if defined(FISHLEG_CUDA_STUBBED)

template <class Table>
void launch(const char*, void (*)(Table), int64_t grid, int, size_t, Stream, const Table& table) {
    if (grid > 0) {
        emulation::count_launch(&table);
    }
}

#elif defined(FISHLEG_CUDA_ON_CPU)

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

/// The same of parts, with the strides of theirs.
template <class Item>
struct PartTable {
    static constexpr int most_strides = table_bytes > 16000 ? 24 : 4;
    static constexpr int capacity = static_cast<int>((table_bytes - 32 - most_strides * sizeof(Strides)) / sizeof(Item));
    int32_t count;
    int32_t tiles;
    int32_t* arrivals;
    Strides strides[most_strides];
    Item items[capacity];
};

/// ``tiles(item)`` says how many thread blocks an item needs. ``add(table, item)``: puts it there, first_tile and all;
/// false where the table has no room left, or is null: a new one begins.
template <class Table, class Items, class Tiles, class Add>
void launch_tables(const char* name, void (*kernel)(Table), Items& items, Tiles tiles, Add add, int threads,
                   size_t shared, Stream stream) {
    static_assert(sizeof(Table) <= table_bytes);
    Table table;
    table.count = table.tiles = 0;
    const auto flush = [&] {
        launch(name, kernel, table.tiles, threads, shared, stream, table);
        table.count = table.tiles = 0;
    };
    for (auto& item : items) {
        const int64_t needed = tiles(item);
        if (needed == 0) {
            continue;
        }
        if (table.tiles + needed > INT32_MAX || !add(table, item)) {
            flush();
            add(table, item);
        }
        table.items[table.count++].first_tile = table.tiles;
        table.tiles += static_cast<int32_t>(needed);
    }
    flush();
}

template <class Item, class Tiles>
void launch_all(const char* name, void (*kernel)(Table<Item>), std::vector<Item>& items, Tiles tiles, int threads,
                size_t shared, Stream stream) {
    const auto add = [](Table<Item>& table, const Item& item) {
        if (table.count == Table<Item>::capacity) {
            return false;
        }
        table.items[table.count] = item;
        return true;
    };
    launch_tables(name, kernel, items, tiles, add, threads, shared, stream);
}

template <class Item, class Tiles>
void launch_all(const char* name, void (*kernel)(PartTable<Item>), const Parts<Item>& parts, Tiles tiles, int threads,
                size_t shared, Stream stream) {
    std::vector<int32_t> places(parts.all.size(), -1);  // of strides in the table
    int32_t used = 0;
    const auto add = [&](PartTable<Item>& table, const Item& item) {
        if (table.count == 0) {
            places.assign(places.size(), -1), used = 0;
            table.arrivals = parts.arrivals;
        }
        int32_t& place = places[item.strides];
        if (table.count == PartTable<Item>::capacity || (place < 0 && used == PartTable<Item>::most_strides)) {
            return false;
        }
        if (place < 0) {
            place = used++;
            table.strides[place] = parts.all[item.strides];
        }
        table.items[table.count] = item;
        table.items[table.count].strides = place;
        return true;
    };
    launch_tables(name, kernel, parts.items, tiles, add, threads, shared, stream);
}

}  // namespace fishleg::cuda
