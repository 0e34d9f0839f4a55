// Launches over lists of any length: as many items at once as a table holds.
#pragma once

#include <vector>

#include "cuda/device/device.h"

namespace fishleg::cuda {

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
