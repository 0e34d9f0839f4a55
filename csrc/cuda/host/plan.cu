// Plans: from blocks to descriptors of kernels (cuda/tables.h). Steps are in plan_theta.cu and plan_lambda.cu.
#include "cuda/host/plan.h"

#include <algorithm>
#include <utility>

#include "cuda/device/products.h"
#include "cuda/device/theta.h"
#include "cuda/host/plan_layout.h"
#include "cuda/host/plan_parts.h"

namespace fishleg::cuda {
namespace {

/// A product's tiles without its pointers.
int64_t tiles_of(int64_t M, int64_t N) {
    Product p{};
    p.M = static_cast<int32_t>(M), p.N = static_cast<int32_t>(N);
    return tiles(p);
}

bool fits_chain(const BlockLayout& b) { return b.m <= chain_width && b.n <= chain_width; }

/// The matrices on the way to a block's polar factor. One of them is x, where there is that: it has been used by then.
void lay_out_polar(const BlockLayout& b, OffsetAllocator& workspace, BlockOffsets& offsets) {
    const int64_t shorter = b.m < b.n ? b.m : b.n;
    Product square{};
    square.M = square.N = static_cast<int32_t>(shorter), square.symmetric = 1;
    offsets.polar = workspace.floats(b.m * offsets.ld);
    offsets.turn = kronecker(b) ? offsets.x : workspace.floats(b.m * offsets.ld);
    offsets.polar_A = workspace.floats(shorter * padded(shorter));
    offsets.polar_B = workspace.floats(shorter * padded(shorter));
    offsets.polar_sums = workspace.take(tiles(square) * static_cast<int64_t>(sizeof(Sums)));
    offsets.polar_scale = workspace.floats(1);
    offsets.polar_norm = workspace.take(sizeof(double));
    offsets.polar_arrivals = workspace.take(sizeof(int32_t));
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
        for (size_t i = 0; i < b.parts.size(); ++i) {
            Strides strides{};
            const Part part = layout_of(b, b.parts[i], padded(b.n), strides);
            add_part(part, strides, static_cast<int32_t>(&b - blocks_.data()), b.parts[i].offset);
            entries += part.count;
        }
        if (b.kind != Kind::uncovered && op_ != Op::refresh && entries != b.m * b.n) {
            throw wrong("its parts have " + std::to_string(entries) + " entries, not " + std::to_string(b.m * b.n));
        }
    }
    lay_out();
}

/// A part with its block and with the offset in it; strides that others have too are theirs.
void Plan::add_part(Part part, const Strides& strides, int32_t block, int64_t offset) {
    std::vector<Strides>& all = op_ == Op::theta ? theta_parts_.all : aux_parts_.all;
    const auto found = std::find(all.begin(), all.end(), strides);
    part.strides = static_cast<int32_t>(found - all.begin());
    if (found == all.end()) {
        all.push_back(strides);
    }
    if (op_ == Op::theta) {
        theta_parts_.items.push_back({part, {}, {}, {}, {}, {}, {}, {}, {}, {}});
    } else {
        aux_parts_.items.push_back({part, {}, {}, {}, {}, {}});
    }
    places_.push_back({block, tiles(part), offset, offset * (blocks_[block].axis == 0 ? padded(blocks_[block].n) : 1)});
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
        ++covered_;
        offsets.sums = part_tiles * one;
        for (const PartPlace& place : places_) {
            offsets.part_tiles += place.block == static_cast<int32_t>(k) ? place.tiles : 0;
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
    arrivals_ = workspace.take(sizeof(int32_t));
    workspace_bytes = workspace.end();
}

void Plan::check(size_t expected, size_t found, const char* what) const {
    if (expected != found) {
        throw std::invalid_argument("this plan needs " + std::to_string(expected) + " " + what + " but there are " +
                                    std::to_string(found));
    }
}

void Plan::check(const Gradients& gradients, Pointers operators) const {
    check(places_.size(), gradients.g.size(), "gradients"), check(places_.size(), gradients.scale.size(), "factors");
    check(5 * covered_, operators.size(), "numbers of operators");
}

/// P and S, or d, of the ``place``th block that is covered, whose number is ``k``.
Plan::Operator Plan::operator_at(Pointers operators, size_t place, size_t k) const {
    const BlockLayout& b = blocks_[k];
    const auto at = [&](size_t i) { return operators[5 * place + i]; };
    const auto matrix = [&](size_t i) { return reinterpret_cast<const float*>(at(i)); };
    const Operator q{matrix(0), at(1), matrix(2), at(3), matrix(4)};
    require(b, q.P, kronecker(b) ? "P" : "d");
    if (kronecker(b)) {
        require(b, q.S, "S");
        if (q.ld_P < b.m || q.ld_S < b.n) {
            throw std::invalid_argument("block '" + b.name + "': P and S should be row-major");
        }
    }
    return q;
}

/// Where the gradient, and the part's entries in the workspace, are.
void Plan::point(Part& p, size_t i, int64_t workspace, Sums*& sums, const Gradients& gradients) const {
    const BlockOffsets& offsets = offsets_[places_[i].block];
    p.g = reinterpret_cast<const void*>(gradients.g[i]);
    p.scale = reinterpret_cast<const float*>(gradients.scale[i]);
    p.x = at<float>(workspace, offsets.x) + places_[i].start;
    p.y = at<float>(workspace, offsets.y) + places_[i].start;
    p.sums = sums;
    sums += places_[i].tiles;
}

/// Queues out = A∘(P x S): a chain, or two products.
void Plan::products_of(int64_t workspace, size_t k, const Operator& q, const float* x, float* out, int64_t out_ld,
                       Sums* sums) {
    const BlockLayout& b = blocks_[k];
    const BlockOffsets& offsets = offsets_[k];
    const int precision = static_cast<int>(b.precision);
    if (fits_chain(b)) {
        Chain c{};
        c.P = q.P, c.X = x, c.S = q.S, c.C = out, c.outer = q.A, c.sums = sums;
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
    second.outer = q.A, second.sums = sums;
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
