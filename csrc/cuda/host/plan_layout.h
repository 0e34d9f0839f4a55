// How a part lies beside its block's matrices, and where a plan's matrices are in its workspace.
#pragma once

#include <stdexcept>

#include "cuda/host/plan.h"

namespace fishleg::cuda {

/// Sizes and strides with dimensions of one entry dropped and those that run on in each other merged.
/// ``strides`` are set, and of the part all but pointers and its number of strides.
inline Part layout_of(const BlockLayout& block, const PartLayout& part, int64_t ld, Strides& strides) {
    const size_t dims = part.shape.size();
    const auto wrong = [&](const std::string& what) {
        return std::invalid_argument("block '" + block.name + "': " + what);
    };
    if (part.theta_strides.size() != dims || part.g_strides.size() != dims) {
        throw wrong("a parameter and its gradient should have as many strides as dimensions");
    }
    struct Dim {
        int64_t size, theta, g, matrix, padded;
    };
    std::vector<Dim> merged;  // innermost first
    int64_t run = 1, count = 1;
    for (size_t d = dims; d-- > 0;) {
        const int64_t size = part.shape[d];
        const bool rows = block.axis == 0 || d == 0;
        const int64_t matrix = block.axis == 0 ? run : rows ? block.n : run;
        const int64_t with_ld = block.axis == 0 ? run * ld : rows ? ld : run;
        run *= size;
        count *= size;
        if (size == 1) {
            continue;
        }
        const Dim dim{size, part.theta_strides[d], part.g_strides[d], matrix, with_ld};
        if (!merged.empty()) {
            Dim& inner = merged.back();
            if (dim.theta == inner.theta * inner.size && dim.g == inner.g * inner.size &&
                dim.matrix == inner.matrix * inner.size && dim.padded == inner.padded * inner.size) {
                inner.size *= size;
                continue;
            }
        }
        merged.push_back(dim);
    }
    if (merged.size() > most_dims) {
        throw wrong("a parameter should have at most " + std::to_string(most_dims) +
                    " dimensions that do not run on in each other, but has " + std::to_string(merged.size()));
    }
    Part p{};
    p.count = count;
    p.dims = static_cast<int32_t>(merged.size());
    for (int d = 0; d < most_dims; ++d) {
        const int from = p.dims - 1 - d;
        const Dim dim = from >= 0 ? merged[from] : Dim{1, 0, 0, 0, 0};
        strides.sizes[d] = dim.size;
        strides.theta[d] = dim.theta;
        strides.g[d] = dim.g;
        strides.matrix[d] = dim.matrix;
        strides.padded[d] = dim.padded;
    }
    p.theta_type = part.theta_type;
    p.g_type = part.g_type;
    p.diagonal = block.kind == Kind::diagonal;
    return p;
}

constexpr int64_t alignment = 256;  // bytes, of what is in a workspace

/// Hands out byte offsets, each at a multiple of the alignment.
class OffsetAllocator {
public:
    int64_t take(int64_t bytes) {
        const int64_t start = end_;
        end_ = (end_ + bytes + alignment - 1) / alignment * alignment;
        return start;
    }
    int64_t floats(int64_t count) { return take(count * static_cast<int64_t>(sizeof(float))); }
    int64_t end() const { return end_; }

private:
    int64_t end_ = 0;
};

}  // namespace fishleg::cuda
