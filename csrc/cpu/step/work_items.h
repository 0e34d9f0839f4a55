// How passes over lists of matrices are shared out: in items of much the same size, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/gemm/engine.h"
#include "cpu/step/table.h"

namespace fishleg::cpu {

/// Adds the items of matrix `index` of a list, (rows, columns), in whole panels of packed operands.
inline void split(int index, int64_t rows, int64_t columns, std::vector<WorkItem>& items) {
    constexpr int64_t size = 32768;   // elements of an item: small enough to share out evenly
    constexpr int64_t widest = 2048;  // columns, where there are several rows
    if (rows == 0 || columns == 0) return;
    const int64_t column_count = rows == 1 ? size : std::min(columns, widest);
    const int64_t row_count = std::max<int64_t>(1, size / column_count / panel) * panel;
    for (int64_t r = 0; r < rows; r += row_count)
        for (int64_t c = 0; c < columns; c += column_count)
            items.push_back({index, r, std::min(rows, r + row_count), c, std::min(columns, c + column_count)});
}

/// `threads`, or one for matrices that are small together; `count` says how many elements one has.
template <class Matrices, class Count>
int threads_for(const Matrices& matrices, int threads, Count count) {
    constexpr int64_t serial_below = 32768;  // elements in all: waking a thread takes longer than these
    int64_t all = 0;
    for (const auto& matrix : matrices) all += count(matrix);
    return all < serial_below ? 1 : threads;
}

}  // namespace fishleg::cpu
