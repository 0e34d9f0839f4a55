// Plans: from blocks to descriptors of kernels (cuda/tables.h). Steps are in plan_theta.cu and plan_lambda.cu.
#include "cuda/host/plan.h"

#include <utility>

#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {
namespace {

constexpr int64_t alignment = 256;

/// Sizes and strides with dimensions of one entry dropped and those that run on in each other merged.
Part layout_of(const BlockLayout& block, const PartLayout& part, int64_t ld) {
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
        p.sizes[d] = dim.size;
        p.theta_strides[d] = dim.theta;
        p.g_strides[d] = dim.g;
        p.matrix_strides[d] = dim.matrix;
        p.padded_strides[d] = dim.padded;
    }
    p.offset = part.offset;
    p.theta_type = part.theta_type;
    p.g_type = part.g_type;
    p.diagonal = block.kind == Kind::diagonal;
    return p;
}

/// A product's tiles without its pointers.
int64_t tiles_of(int64_t M, int64_t N) {
    Product p{};
    p.M = static_cast<int32_t>(M), p.N = static_cast<int32_t>(N);
    return tiles(p);
}

bool fits_chain(const BlockLayout& b) { return b.m <= chain_width && b.n <= chain_width; }

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

/// The matrices on the way to a block's polar factor. One of them is x, where there is that: it has been used by then.
void lay_out_polar(const BlockLayout& b, OffsetAllocator& workspace, BlockOffsets& offsets) {
    const int64_t shorter = b.m < b.n ? b.m : b.n;
    Product square{};
    square.M = square.N = static_cast<int32_t>(shorter), square.symmetric = 1;
    offsets.polar_tiles = tiles(square);
    offsets.polar = workspace.floats(b.m * offsets.ld);
    offsets.turn = kronecker(b) ? offsets.x : workspace.floats(b.m * offsets.ld);
    offsets.polar_A = workspace.floats(shorter * padded(shorter));
    offsets.polar_B = workspace.floats(shorter * padded(shorter));
    offsets.polar_sums = workspace.take(offsets.polar_tiles * static_cast<int64_t>(sizeof(Sums)));
    offsets.polar_scale = workspace.floats(1);
}

/// The matrices of one block, and how many tiles its products with sums have.
void lay_out_matrices(Op op, const BlockLayout& b, OffsetAllocator& workspace, BlockOffsets& offsets) {
    const bool lambda = op == Op::lambda;
    if (kronecker(b) && op != Op::refresh) {
        Chain chain{};
        chain.m = static_cast<int32_t>(b.m), chain.n = static_cast<int32_t>(b.n);
        offsets.product_tiles = lambda ? tiles_of(b.n, b.n) + tiles_of(b.m, b.m)
                                : fits_chain(b) ? tiles(chain)
                                                : tiles_of(b.m, b.n);
        offsets.x = workspace.floats(b.m * offsets.ld);
        offsets.y = op == Op::qv ? 0 : workspace.floats(b.m * offsets.ld);
        offsets.t = lambda || !fits_chain(b) ? workspace.floats(b.m * offsets.ld) : 0;
        if (lambda) {
            offsets.t2 = workspace.floats(b.m * offsets.ld);
            offsets.M = workspace.floats(b.n * offsets.ld), offsets.N = workspace.floats(b.m * offsets.ld_m);
            offsets.dL = workspace.floats(b.n * b.n), offsets.dR = workspace.floats(b.m * b.m);
        }
    } else if (lambda) {
        offsets.dL = workspace.floats(b.m * b.n);  // of d
    }
}

}  // namespace

Plan::Plan(Op op, std::vector<BlockLayout> blocks, int device)
    : op_(op), device_(device), blocks_(std::move(blocks)) {
    for (const BlockLayout& b : blocks_) {
        const auto wrong = [&](const std::string& what) {
            return std::invalid_argument("block '" + b.name + "': " + what);
        };
        if (b.m < 0 || b.n < 0 || b.m > 1 << 30 || b.n > 1 << 30) {
            if (b.kind != Kind::diagonal) {
                throw wrong("its sides should be at most 2^30");
            }
        }
        if (op_ == Op::lambda && b.kind == Kind::scaled_kron) {
            throw wrong("an outer diagonal's gradient is not computed by this plan");
        }
        if (b.flat && (op_ != Op::theta || b.axis != 1 || b.m < 1 || b.n < 1)) {
            throw wrong("polar factors are of matrices, in a θ step");
        }
        if (b.axis != 0 && b.axis != 1) {
            throw wrong("axis should be 0 or 1 but is " + std::to_string(b.axis));
        }
        int64_t entries = 0;
        const int64_t ld = padded(b.n);
        std::vector<Part> parts;
        for (const PartLayout& part : b.parts) {
            parts.push_back(layout_of(b, part, ld));
            entries += parts.back().count;
        }
        if (b.kind != Kind::uncovered && op_ != Op::refresh && entries != b.m * b.n) {
            throw wrong("its parts have " + std::to_string(entries) + " entries, not " + std::to_string(b.m * b.n));
        }
        templates_.push_back(std::move(parts));
    }
    lay_out();
}

void Plan::lay_out() {
    OffsetAllocator workspace;
    const int64_t one = sizeof(Sums);
    int64_t part_tiles = 0, product_tiles = 0, uncovered = 0;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        const BlockLayout& b = blocks_[k];
        BlockOffsets offsets{};
        offsets.ld = padded(b.n), offsets.ld_m = padded(b.m);
        if (b.kind == Kind::uncovered) {
            offsets.sums = uncovered++ * one;  // from the start of the external sums
            if (b.flat) {
                lay_out_polar(b, workspace, offsets);
            }
            offsets_.push_back(offsets);
            continue;
        }
        offsets.sums = part_tiles * one;
        for (const Part& p : templates_[k]) {
            offsets.part_tiles += tiles(p);
        }
        part_tiles += offsets.part_tiles;
        offsets.product_sums = product_tiles * one;
        lay_out_matrices(op_, b, workspace, offsets);
        if (b.flat) {
            lay_out_polar(b, workspace, offsets);
        }
        product_tiles += offsets.product_tiles;
        offsets_.push_back(offsets);
    }
    sums_count_ = part_tiles + uncovered;
    sums_ = workspace.take(sums_count_ * one);
    external = sums_ + part_tiles * one;
    sums_2_count_ = part_tiles + product_tiles + uncovered;
    sums_2_ = workspace.take(sums_2_count_ * one);
    external_2 = sums_2_ + (part_tiles + product_tiles) * one;
    for (size_t k = 0; k < blocks_.size(); ++k) {
        BlockOffsets& offsets = offsets_[k];
        if (blocks_[k].kind == Kind::uncovered) {
            offsets.sums += external;
            continue;
        }
        offsets.sums_2 = sums_2_ + offsets.sums;
        offsets.sums += sums_;
        offsets.product_sums += sums_2_ + part_tiles * one;
    }
    scales = workspace.take(static_cast<int64_t>(blocks_.size() * sizeof(double)));
    statistics_ = workspace.take(static_cast<int64_t>(blocks_.size() * sizeof(NatStatistics)));
    aux_ = workspace.take(sizeof(AuxLoss));
    workspace_bytes = workspace.end();
}

/// P and S, or d.
Plan::Operator Plan::operator_at(Pointers& pointers, size_t k) const {
    Operator q{};
    q.P = next<const float>(pointers);
    q.ld_P = next_number(pointers);
    q.S = next<const float>(pointers);
    q.ld_S = next_number(pointers);
    const BlockLayout& b = blocks_[k];
    require(b, q.P, kronecker(b) ? "P" : "d");
    if (kronecker(b)) {
        require(b, q.S, "S");
        if (q.ld_P < b.m || q.ld_S < b.n) {
            throw std::invalid_argument("block '" + b.name + "': P and S should be row-major");
        }
    }
    return q;
}

/// The parts of block ``k`` with their g and scale, and where their entries are in the workspace.
std::vector<Part> Plan::parts_at(int64_t workspace, Pointers& pointers, size_t k) const {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    std::vector<Part> parts = templates_[k];
    Sums* sums = at<Sums>(workspace, offsets.sums);
    for (size_t i = 0; i < parts.size(); ++i) {
        Part& p = parts[i];
        p.g = next<const void>(pointers);
        p.scale = next<const float>(pointers);
        const int64_t start = b.parts[i].offset * (b.axis == 0 ? offsets.ld : 1);
        p.x = at<float>(workspace, offsets.x) + start;
        p.y = at<float>(workspace, offsets.y) + start;
        p.sums = sums;
        sums += tiles(p);
    }
    return parts;
}

/// Where A or d is beside a part's entries.
const float* Plan::factor_at(const BlockLayout& b, const Operator& q, const float* A, const Part& p) {
    return kronecker(b) ? (A ? A + p.offset : nullptr) : q.P + p.offset;
}

/// Queues out = outer∘(P x S): a chain, or two products.
void Plan::products_of(int64_t workspace, size_t k, const Operator& q, const float* outer, const float* x, float* out,
                       int64_t out_ld, Sums* sums) {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    const int precision = static_cast<int>(b.precision);
    if (fits_chain(b)) {
        Chain c{};
        c.P = q.P, c.X = x, c.S = q.S, c.C = out, c.outer = outer, c.sums = sums;
        c.m = static_cast<int32_t>(b.m), c.n = static_cast<int32_t>(b.n);
        c.ldp = static_cast<int32_t>(q.ld_P), c.lds = static_cast<int32_t>(q.ld_S);
        c.ld = static_cast<int32_t>(offsets.ld), c.ldc = static_cast<int32_t>(out_ld);
        c.aligned_p = aligned(q.P, q.ld_P), c.aligned_s = aligned(q.S, q.ld_S);
        chains_[precision].push_back(c);
        return;
    }
    float* const t = at<float>(workspace, offsets.t);
    first_[precision].push_back(product(q.P, q.ld_P, x, offsets.ld, t, offsets.ld, b.m, b.n, b.m));
    Product second = product(t, offsets.ld, q.S, q.ld_S, out, out_ld, b.m, b.n, b.n);
    second.outer = outer, second.sums = sums;
    second.pair = sums ? x : nullptr;
    second_[precision].push_back(second);
}

/// Launches what is queued: first_ and second_ after each other, chains apart.
void Plan::run_products(Stream stream) {
    for (int precision = 0; precision < 4; ++precision) {
        const auto value = static_cast<Precision>(precision);
        chain_all(chains_[precision], value, stream);
        multiply_all(first_[precision], value, stream);
        multiply_all(second_[precision], value, stream);
        chains_[precision].clear(), first_[precision].clear(), second_[precision].clear();
    }
}

}  // namespace fishleg::cuda
