#include "cpu/gemm/products.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "cpu/common/tiles.h"
#include "cpu/common/threads.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t together = 2;  // panels of the longer side that meet a panel of the other while it is in cache

int64_t panels(int64_t lanes) { return (lanes + panel - 1) / panel; }

int64_t padded(const Engine& engine, int64_t depth) { return (depth + engine.step - 1) / engine.step * engine.step; }

int64_t panel_bytes(const Engine& engine, int64_t depth) { return panel * padded(engine, depth) * engine.size; }

const char* part(const void* packed, int64_t bytes) { return static_cast<const char*>(packed) + bytes; }
char* part(void* packed, int64_t bytes) { return static_cast<char*>(packed) + bytes; }

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
        for (int64_t k = 0; k < count; k += together)
            all.push_back({static_cast<int>(p), of_rows, k, std::min(count, k + together)});
    }
    return all;
}

/// out = beta out + alpha c, of a corner of c.
void average(const float* c, int64_t rows, int64_t columns, float* out, const Product& p) {
    for (int64_t r = 0; r < rows; ++r, c += panel, out += p.stride) {
        if (p.beta == 0)
            for (int64_t k = 0; k < columns; ++k) out[k] = p.alpha * c[k];
        else
            for (int64_t k = 0; k < columns; ++k) out[k] = p.beta * out[k] + p.alpha * c[k];
    }
}

/// 32 × 32 of a product, at panel i of the left operand and panel j of the right one.
void compute(const Engine& engine, const Product& p, int64_t i, int64_t j) {
    const int64_t bytes = panel_bytes(engine, p.depth);
    const void *left = part(p.left, i * bytes), *right = part(p.right, j * bytes);
    const int64_t rows = std::min(panel, p.rows - i * panel), columns = std::min(panel, p.columns - j * panel);
    if (p.target == Target::matrix) {
        float* out = static_cast<float*>(p.out) + i * panel * p.stride + j * panel;
        const bool averaged = p.alpha != 1 || p.beta != 0, whole = rows == panel && columns == panel;
        float* mirrored = p.symmetric && i != j ? static_cast<float*>(p.out) + j * panel * p.stride + i * panel : nullptr;
        if (whole && averaged) expect(out, p.stride);
        if (whole && mirrored) expect(mirrored, p.stride);
        if (averaged) {
            alignas(64) float c[panel * panel];
            engine.block(left, right, p.depth, rows, columns, c, panel, false);
            average(c, rows, columns, out, p);
        } else {
            multiply_block(engine, left, right, p.depth, rows, columns, out, p.stride);
        }
        if (mirrored && whole) transpose(out, p.stride, mirrored, p.stride);
        else if (mirrored)
            for (int64_t k = 0; k < columns; ++k)
                for (int64_t r = 0; r < rows; ++r) mirrored[k * p.stride + r] = out[r * p.stride + k];
        return;
    }
    alignas(64) float c[panel * panel];
    engine.block(left, right, p.depth, rows, columns, c, panel, false);
    const bool by_rows = p.target == Target::left;
    const Side side = by_rows ? Side::left : Side::right;
    const int64_t out_bytes = panel_bytes(engine, by_rows ? p.columns : p.rows);
    const auto place = [&](int64_t lanes, int64_t depth) {
        return part(p.out, lanes * out_bytes + depth * panel * panel * engine.size);
    };
    const Lanes rows_as_lanes{c, rows, columns, panel, 1}, columns_as_lanes{c, columns, rows, 1, panel};
    engine.pack(side, by_rows ? rows_as_lanes : columns_as_lanes, by_rows ? place(i, j) : place(j, i));
    if (p.symmetric && i != j)
        engine.pack(side, by_rows ? columns_as_lanes : rows_as_lanes, by_rows ? place(j, i) : place(i, j));
}

void run(const Engine& engine, const std::vector<Product>& products, const Share& share) {
    const Product& p = products[share.product];
    const int64_t others = panels(share.of_rows ? p.columns : p.rows);
    for (int64_t other = 0; other < others; ++other) {
        for (int64_t mine = share.begin; mine < share.end; ++mine) {
            const int64_t i = share.of_rows ? mine : other, j = share.of_rows ? other : mine;
            if (!p.symmetric || j <= i) compute(engine, p, i, j);
        }
    }
}

}  // namespace

std::vector<const Engine*> engines() {
    std::vector<const Engine*> all;
    for (const Engine* engine : {amx_engine(), amx_split_engine(), avx512_engine()})
        if (engine) all.push_back(engine);
    return all;
}

const Engine& engine_of(const std::string& name) {
    std::string names;
    for (const Engine* engine : engines()) {
        if (name == engine->name) return *engine;
        names += (names.empty() ? "" : ", ") + std::string(engine->name);
    }
    throw std::invalid_argument("engine should be one that this processor has (" +
                                (names.empty() ? "none" : names) + ") but is: " + name);
}

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
        const int64_t place = tasks[t].second * panel_bytes(engine, depth) + job.after * panel * engine.size;
        engine.pack(job.side, from, part(job.to, place));
    });
}

void multiply_block(const Engine& engine, const void* left, const void* right, int64_t depth, int64_t rows,
                    int64_t columns, float* out, int64_t stride) {
    if (rows == panel && columns == panel) return engine.block(left, right, depth, rows, columns, out, stride, false);
    alignas(64) float c[panel * panel];
    engine.block(left, right, depth, rows, columns, c, panel, false);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(c + r * panel, columns, out + r * stride);
}

void multiply(const Engine& engine, const std::vector<Product>& products, int threads) {
    const std::vector<Share> all = shares(products);
    parallel_for_uneven(static_cast<int64_t>(all.size()), threads, [&](int64_t t) {
        alignas(64) char saved[64];
        engine.enter(saved);
        run(engine, products, all[t]);
        engine.leave(saved);
    });
}

float largest(const Engine& engine, const void* packed, int64_t lanes, int64_t depth) {
    const int64_t count = packed_size(engine, lanes, depth) / engine.size;
    // As bits without the sign, floating-point numbers are in the order of their magnitudes.
    uint32_t most = 0;
    if (engine.size == 2) {
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

void multiply_part(const Engine& engine, const Factors& factors, const Part& of, float* out, int64_t stride) {
    const int64_t bytes = panel_bytes(engine, factors.depth);
    const int64_t rows = of.row_end - of.row_begin, columns = of.column_end - of.column_begin;
    alignas(64) char saved[64];
    engine.enter(saved);
    for (int64_t j = 0; j < columns; j += panel) {
        const void* right = part(factors.right, (of.column_begin + j) / panel * bytes);
        for (int64_t i = 0; i < rows; i += panel) {
            const void* left = part(factors.left, (of.row_begin + i) / panel * bytes);
            multiply_block(engine, left, right, factors.depth, std::min(panel, rows - i), std::min(panel, columns - j),
                           out + i * stride + j, stride);
        }
    }
    engine.leave(saved);
}

const float* part_of(const Engine& engine, const Factors& factors, const Part& of, int64_t* stride) {
    thread_local std::vector<float> room;
    *stride = panels(of.column_end - of.column_begin) * panel;
    room.resize((of.row_end - of.row_begin) * *stride + 16);
    void* start = room.data();
    size_t space = room.size() * sizeof(float);
    float* out = static_cast<float*>(std::align(64, 1, start, space));
    multiply_part(engine, factors, of, out, *stride);
    return out;
}

}  // namespace fishleg::cpu
