// Passes over the entries of parts: where each entry lies, and how 16-bit ones are read and written.
#pragma once

#include "cuda/device/device.h"

namespace fishleg::cuda {

constexpr int entry_threads = 256;

/// Offsets of one entry from the part's first one.
struct Place {
    int64_t theta, g, matrix, padded;
};

__device__ __forceinline__ Place place_of(const Part& p, const Strides& s, int64_t entry) {
    Place at{};
    const auto step = [&](int d, int64_t i) {
        at.theta += i * s.theta[d];
        at.g += i * s.g[d];
        at.matrix += i * s.matrix[d];
        at.padded += i * s.padded[d];
    };
    if (p.count < INT32_MAX) {
        uint32_t rest = static_cast<uint32_t>(entry);
#pragma unroll
        for (int d = most_dims - 1; d > 0; --d) {
            if (d < p.dims) {
                const uint32_t size = static_cast<uint32_t>(s.sizes[d]), next = rest / size;
                step(d, rest - next * size);
                rest = next;
            }
        }
        step(0, rest);
    } else {
        int64_t rest = entry;
#pragma unroll
        for (int d = most_dims - 1; d > 0; --d) {
            if (d < p.dims) {
                const int64_t next = rest / s.sizes[d];
                step(d, rest - next * s.sizes[d]);
                rest = next;
            }
        }
        step(0, rest);
    }
    return at;
}

__device__ __forceinline__ float read(const void* from, Type type, int64_t at) {
    switch (type) {
        case Type::bf16: return widen(static_cast<const BFloat16*>(from)[at]);
        case Type::f16: return widen(static_cast<const Float16*>(from)[at]);
        default: return static_cast<const float*>(from)[at];
    }
}

/// An entry of a part's gradient.
__device__ __forceinline__ float gradient(const Part& p, const Place& at) {
    if (!p.g) {
        return 0;
    }
    const float g = read(p.g, p.g_type, at.g);
    return p.scale ? g * *p.scale : g;
}

__device__ __forceinline__ void write(void* to, Type type, int64_t at, float value) {
    switch (type) {
        case Type::bf16: narrow(value, static_cast<BFloat16*>(to)[at]); break;
        case Type::f16: narrow(value, static_cast<Float16*>(to)[at]); break;
        default: narrow(value, static_cast<float*>(to)[at]);
    }
}

/// load(place) for four entries, then store(place, loaded) for each: so that four are on their way at once.
template <class Loaded, class Item, class Load, class Store>
__device__ __forceinline__ void for_entries(const PartWork<Item>& work, Load load, Store store) {
    constexpr int at_once = 4;
    const Part& p = work.item;
    const int64_t first = static_cast<int64_t>(work.tile) * tile_entries;
    const int64_t last = first + tile_entries < p.count ? first + tile_entries : p.count;
    for (int64_t base = first + threadIdx.x; base < last; base += at_once * entry_threads) {
        Place places[at_once];
        Loaded loaded[at_once];
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
            if (base + k * entry_threads < last) {
                places[k] = place_of(p, work.strides, base + k * entry_threads);
                loaded[k] = load(places[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
            if (base + k * entry_threads < last) {
                store(places[k], loaded[k]);
            }
        }
    }
}

}  // namespace fishleg::cuda
