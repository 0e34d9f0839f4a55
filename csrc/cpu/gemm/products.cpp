#include "cpu/gemm/products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "cpu/common/threads.h"
#include "cpu/common/tiles.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t panels_at_once = 2;  // of the longer side, which meet a panel of the other while it is in cache

int64_t panels(int64_t lanes) { return (lanes + panel - 1) / panel; }

int64_t padded(const Engine& engine, int64_t depth) {
    return (depth + engine.depth_step - 1) / engine.depth_step * engine.depth_step;
}

int64_t panel_bytes(const Engine& engine, int64_t depth) {
    return panel * padded(engine, depth) * engine.element_bytes;
}

const char* at_byte(const void* packed, int64_t bytes) { return static_cast<const char*>(packed) + bytes; }
char* at_byte(void* packed, int64_t bytes) { return static_cast<char*>(packed) + bytes; }

/// Some panels of one side of a product, with all of the other.
struct Share {
    int product;
    bool of_rows;
    int64_t begin, end;
};

std::vector<Share> shares(const std::vector<Product>& products) {
    std::vector<Share> all;
    for (size_t p = 0; p < products.size(); ++p) {
        const int64_t rows = panels(products[p].rows), columns = panels(products[p].columns);
        const bool of_rows = rows >= columns;
        const int64_t count = of_rows ? rows : columns;
        for (int64_t k = 0; k < count; k += panels_at_once)
            all.push_back({static_cast<int>(p), of_rows, k, std::min(count, k + panels_at_once)});
    }
    return all;
}

/// out = beta out + alpha c, of a corner of c.
void axpby(const float* c, int64_t rows, int64_t columns, float* out, const Product& p) {
    for (int64_t r = 0; r < rows; ++r, c += panel, out += p.stride) {
        if (p.beta == 0)
            for (int64_t k = 0; k < columns; ++k) out[k] = p.alpha * c[k];
        else
            for (int64_t k = 0; k < columns; ++k) out[k] = p.beta * out[k] + p.alpha * c[k];
    }
}

/// A tile of a product: panel i of the left operand with panel j of the right one.
void compute_tile(const Engine& engine, const Product& p, int64_t i, int64_t j) {
    const int64_t bytes = panel_bytes(engine, p.depth);
    const void *left = at_byte(p.left, i * bytes), *right = at_byte(p.right, j * bytes);
    const int64_t rows = std::min(panel, p.rows - i * panel), columns = std::min(panel, p.columns - j * panel);
    if (p.target == Target::matrix) {
        float* out = static_cast<float*>(p.out) + i * panel * p.stride + j * panel;
        const bool averaged = p.alpha != 1 || p.beta != 0, whole = rows == panel && columns == panel;
        float* mirrored =
            p.symmetric && i != j ? static_cast<float*>(p.out) + j * panel * p.stride + i * panel : nullptr;
        if (whole && averaged) prefetch_tile(out, p.stride);
        if (whole && mirrored) prefetch_tile(mirrored, p.stride);
        if (averaged) {
            alignas(64) float c[panel * panel];
            engine.microkernel(left, right, p.depth, rows, columns, c, panel, false);
            axpby(c, rows, columns, out, p);
        } else {
            multiply_tile(engine, left, right, p.depth, rows, columns, out, p.stride);
        }
        if (mirrored && whole) transpose_tile(out, p.stride, mirrored, p.stride);
        else if (mirrored)
            for (int64_t k = 0; k < columns; ++k)
                for (int64_t r = 0; r < rows; ++r) mirrored[k * p.stride + r] = out[r * p.stride + k];
        return;
    }
    alignas(64) float c[panel * panel];
    engine.microkernel(left, right, p.depth, rows, columns, c, panel, false);
    const bool by_rows = p.target == Target::left;
    const Side side = by_rows ? Side::left : Side::right;
    const int64_t out_bytes = panel_bytes(engine, by_rows ? p.columns : p.rows);
    const auto place = [&](int64_t lanes, int64_t depth) {
        return at_byte(p.out, lanes * out_bytes + depth * panel * panel * engine.element_bytes);
    };
    const Lanes rows_as_lanes{c, rows, columns, panel, 1}, columns_as_lanes{c, columns, rows, 1, panel};
    engine.pack(side, by_rows ? rows_as_lanes : columns_as_lanes, by_rows ? place(i, j) : place(j, i));
    if (p.symmetric && i != j)
        engine.pack(side, by_rows ? columns_as_lanes : rows_as_lanes, by_rows ? place(j, i) : place(i, j));
}

void multiply_share(const Engine& engine, const std::vector<Product>& products, const Share& share) {
    const Product& p = products[share.product];
    const int64_t others = panels(share.of_rows ? p.columns : p.rows);
    for (int64_t other = 0; other < others; ++other) {
        for (int64_t mine = share.begin; mine < share.end; ++mine) {
            const int64_t i = share.of_rows ? mine : other, j = share.of_rows ? other : mine;
            if (!p.symmetric || j <= i) compute_tile(engine, p, i, j);
        }
    }
}

}  // namespace

int64_t packed_size(const Engine& engine, int64_t lanes, int64_t depth) {
    return panels(lanes) * panel_bytes(engine, depth);
}

void pack(const Engine& engine, const std::vector<PackJob>& jobs, int threads) {
    std::vector<std::pair<int, int64_t>> tasks;
    for (size_t k = 0; k < jobs.size(); ++k)
        for (int64_t i = 0; i < panels(jobs[k].from.lanes); ++i) tasks.emplace_back(static_cast<int>(k), i);
    parallel_for_uneven(static_cast<int64_t>(tasks.size()), threads, [&](int64_t t) {
        const PackJob& job = jobs[tasks[t].first];
        const int64_t first = tasks[t].second * panel;
        Lanes from = job.from;
        from.source += first * from.lane_stride;
        from.lanes = std::min(panel, from.lanes - first);
        const int64_t depth = std::max(job.depth, from.depth);
        const int64_t place = tasks[t].second * panel_bytes(engine, depth) + job.after * panel * engine.element_bytes;
        engine.pack(job.side, from, at_byte(job.to, place));
    });
}

void multiply_tile(const Engine& engine, const void* left, const void* right, int64_t depth, int64_t rows,
                   int64_t columns, float* out, int64_t stride) {
    if (rows == panel && columns == panel)
        return engine.microkernel(left, right, depth, rows, columns, out, stride, false);
    alignas(64) float c[panel * panel];
    engine.microkernel(left, right, depth, rows, columns, c, panel, false);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * panel, columns, out + r * stride);
}

void multiply(const Engine& engine, const std::vector<Product>& products, int threads) {
    const std::vector<Share> all = shares(products);
    parallel_for_uneven(static_cast<int64_t>(all.size()), threads, [&](int64_t t) {
        alignas(64) char saved[64];
        engine.enter(saved);
        multiply_share(engine, products, all[t]);
        engine.leave(saved);
    });
}

float largest(const Engine& engine, const void* packed, int64_t lanes, int64_t depth) {
    const int64_t count = packed_size(engine, lanes, depth) / engine.element_bytes;
    // As bits without the sign, floating-point numbers are in the order of their magnitudes.
    uint32_t most = 0;
    if (engine.element_bytes == 2) {
        const auto* bits = static_cast<const uint16_t*>(packed);
        uint16_t found = 0;
        for (int64_t k = 0; k < count; ++k) found = std::max<uint16_t>(found, bits[k] & 0x7fffu);
        most = static_cast<uint32_t>(found) << 16;
    } else {
        const auto* bits = static_cast<const uint32_t*>(packed);
        for (int64_t k = 0; k < count; ++k) most = std::max(most, bits[k] & 0x7fffffffu);
    }
    float value;
    std::memcpy(&value, &most, sizeof value);
    return std::isfinite(value) ? value : std::numeric_limits<float>::infinity();
}

void multiply_rectangle(const Engine& engine, const PackedFactors& factors, const Rectangle& of, float* out,
                        int64_t stride) {
    const int64_t bytes = panel_bytes(engine, factors.depth);
    const int64_t rows = of.row_end - of.row_begin, columns = of.column_end - of.column_begin;
    alignas(64) char saved[64];
    engine.enter(saved);
    for (int64_t j = 0; j < columns; j += panel) {
        const void* right = at_byte(factors.right, (of.column_begin + j) / panel * bytes);
        for (int64_t i = 0; i < rows; i += panel) {
            const void* left = at_byte(factors.left, (of.row_begin + i) / panel * bytes);
            multiply_tile(engine, left, right, factors.depth, std::min(panel, rows - i), std::min(panel, columns - j),
                           out + i * stride + j, stride);
        }
    }
    engine.leave(saved);
}

const float* multiply_into_scratch(const Engine& engine, const PackedFactors& factors, const Rectangle& of,
                                   int64_t* stride) {
    thread_local std::vector<float> scratch;
    *stride = panels(of.column_end - of.column_begin) * panel;
    scratch.resize((of.row_end - of.row_begin) * *stride + 16);
    void* start = scratch.data();
    size_t space = scratch.size() * sizeof(float);
    float* out = static_cast<float*>(std::align(64, 1, start, space));
    multiply_rectangle(engine, factors, of, out, *stride);
    return out;
}

}  // namespace fishleg::cpu
