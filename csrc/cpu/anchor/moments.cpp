#include "cpu/anchor/moments.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/squares.h"
#include "cpu/common/threads.h"
#include "cpu/common/workspace.h"
#include "cpu/gemm/products.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t positions_at_once = 2048;             // packed together
constexpr int64_t workspace_bytes = int64_t{32} << 20;  // more only for a single product

/// Σ x² over some positions.
double square(const Moment& m, int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t i = begin; i < end; ++i) total += sum_of_squares(m.x + i * m.stride, m.size);
    return total;
}

/// Of each moment whether the trace of what is added is finite.
std::vector<char> finite(const std::vector<const Moment*>& moments, int threads) {
    struct PositionRange {
        size_t moment;
        int64_t begin, end;
        double square;
    };
    std::vector<PositionRange> ranges;
    for (size_t k = 0; k < moments.size(); ++k) {
        const int64_t length = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, moments[k]->size));
        for (int64_t i = 0; i < moments[k]->positions; i += length)
            ranges.push_back({k, i, std::min(moments[k]->positions, i + length), 0});
    }
    parallel_for(static_cast<int64_t>(ranges.size()), threads, [&](int64_t r) {
        ranges[r].square = square(*moments[ranges[r].moment], ranges[r].begin, ranges[r].end);
    });
    std::vector<double> totals(moments.size(), 0);
    for (const PositionRange& range : ranges) totals[range.moment] += range.square;
    std::vector<char> ok;
    for (size_t k = 0; k < moments.size(); ++k)
        ok.push_back(std::isfinite(static_cast<float>(totals[k] * moments[k]->alpha)));
    return ok;
}

/// The products of xᵀx over positions first …, those of a moment that has so many, as many moments at a time as the
/// workspace holds.
void add(const Engine& engine, const std::vector<const Moment*>& moments, int64_t first, Workspace& workspace,
         int threads) {
    for (size_t begin = 0, end = 0; begin < moments.size(); begin = end) {
        int64_t bytes = 0;
        const auto depth = [&](const Moment& m) { return std::min(positions_at_once, m.positions - first); };
        const auto size = [&](const Moment& m) {
            return depth(m) > 0 ? (packed_size(engine, m.size, depth(m)) + 63) / 64 * 64 : 0;
        };
        for (; end < moments.size(); ++end) {
            const int64_t more = 2 * size(*moments[end]);
            if (end > begin && bytes + more > workspace_bytes) break;
            bytes += more;
        }
        char* next = workspace.reserve(bytes);
        std::vector<PackJob> jobs;
        std::vector<Product> products;
        for (size_t k = begin; k < end; ++k) {
            const Moment& m = *moments[k];
            // Without positions the average still decays.
            if (depth(m) <= 0 && (first || m.positions)) continue;
            Product p{};
            p.rows = p.columns = m.size;
            p.stride = m.out_stride;
            p.depth = std::max<int64_t>(0, depth(m));
            p.out = m.out, p.symmetric = true;
            p.alpha = m.alpha, p.beta = first ? 1 : m.beta;
            p.left = next, p.right = next + size(m);
            const Lanes x{m.x + first * m.stride, m.size, p.depth, 1, m.stride};
            if (p.depth) {
                jobs.push_back({Side::left, x, next});
                jobs.push_back({Side::right, x, next + size(m)});
            }
            next += 2 * size(m);
            products.push_back(p);
        }
        pack(engine, jobs, threads);
        multiply(engine, products, threads);
    }
}

}  // namespace

std::vector<char> average(const Engine& engine, const std::vector<Moments>& blocks, int threads) {
    thread_local Workspace workspace;
    std::vector<const Moment*> all, chosen;
    for (const Moments& block : blocks)
        for (const Moment& m : block) all.push_back(&m);
    const std::vector<char> ok = finite(all, threads);
    std::vector<char> done;
    int64_t most = 1;
    auto each = ok.begin();
    for (const Moments& block : blocks) {
        const auto last = each + static_cast<std::ptrdiff_t>(block.size());
        done.push_back(std::all_of(each, last, [](char one) { return one; }));
        each = last;
        if (!done.back()) continue;
        for (const Moment& m : block) {
            chosen.push_back(&m);
            most = std::max(most, m.positions);
        }
    }
    for (int64_t first = 0; first < most; first += positions_at_once)
        add(engine, chosen, first, workspace, threads);
    workspace.keep_at_most(workspace_bytes);
    return done;
}

}  // namespace fishleg::cpu
