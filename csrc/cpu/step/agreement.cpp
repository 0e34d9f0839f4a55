#include "cpu/step/agreement.h"

#include <algorithm>
#include <cmath>

#include "cpu/step/kernels.h"
#include "cpu/common/threads.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t rows_at_once = 64;  // of a gradient, that one task looks at

/// What is known of one gradient before its own rows are read.
struct Sides {
    std::vector<double> along;  // H z
    double rows = 0;            // Σ ‖Eₖ‖²‖Hₖ‖²
};

/// f(first row, dots, squares) for the rows of a matrix, four at a time; of the last ones some may be beyond its end.
template <class T, class F>
void for_fours(const Kernels& run, const void* x, int64_t begin, int64_t end, int64_t width, const void* z, F f) {
    double dots[4], squares[4];
    for (int64_t i = begin; i < end; i += 4) {
        if (end - i >= 4) {
            run.probe(static_cast<const T*>(x) + i * width, width, z, width, dots, squares);
            for (int64_t k = 0; k < 4; ++k) f(i + k, dots[k], squares[k]);
        } else {
            for (int64_t k = i; k < end; ++k) {  // four times the same row
                run.probe(static_cast<const T*>(x) + k * width, 0, z, width, dots, squares);
                f(k, dots[0], squares[0]);
            }
        }
    }
}

template <class T>
Sides sides_of(const LowRankGradient& g, int64_t columns) {
    const Kernels& run = kernels(g.dtype);
    std::vector<double> squares(g.rank);
    Sides sides{std::vector<double>(g.rank)};
    for_fours<T>(run, g.H, 0, g.rank, columns, g.z,
                 [&](int64_t k, double dot, double square) { sides.along[k] = dot, squares[k] = square; });
    for_fours<T>(run, g.E, 0, g.rank, g.rows, g.E,
                 [&](int64_t k, double, double square) { sides.rows += squares[k] * square; });
    return sides;
}

/// The share of rows begin … end in the sums of squares.
template <class T>
Agreement share_of(const LowRankGradient& g, const Sides& sides, int64_t begin, int64_t end) {
    const Kernels& run = kernels(g.dtype);
    double got[rows_at_once] = {}, want[rows_at_once] = {};
    Agreement found;
    int64_t first = 0;
    for (const Columns& c : g.columns) {
        for_fours<T>(run, c.grad, begin, end, c.width, static_cast<const T*>(g.z) + first,
                     [&](int64_t i, double dot, double square) { got[i - begin] += dot, found.square += square; });
        first += c.width;
    }
    for (int64_t k = 0; k < g.rank; ++k)
        run.add(static_cast<const T*>(g.E) + k * g.rows + begin, sides.along[k], end - begin, want);
    for (int64_t i = 0; i < end - begin; ++i) {
        found.size += got[i] * got[i];
        found.difference += (got[i] - want[i]) * (got[i] - want[i]);
    }
    return found;
}

}  // namespace

std::vector<Agreement> agreements(const std::vector<LowRankGradient>& gradients, int threads) {
    const auto count = static_cast<int64_t>(gradients.size());
    std::vector<Sides> sides(gradients.size());
    parallel_for_uneven(count, threads, [&](int64_t b) {
        const LowRankGradient& g = gradients[b];
        int64_t columns = 0;
        for (const Columns& c : g.columns) columns += c.width;
        sides[b] = g.dtype == Dtype::float64 ? sides_of<double>(g, columns) : sides_of<float>(g, columns);
    });
    std::vector<std::pair<int64_t, int64_t>> tasks;  // gradient, first row
    for (int64_t b = 0; b < count; ++b)
        for (int64_t i = 0; i < gradients[b].rows; i += rows_at_once) tasks.emplace_back(b, i);
    std::vector<Agreement> parts(tasks.size()), totals(gradients.size());
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t t) {
        const auto [b, begin] = tasks[t];
        const LowRankGradient& g = gradients[b];
        const int64_t end = std::min(g.rows, begin + rows_at_once);
        parts[t] = g.dtype == Dtype::float64 ? share_of<double>(g, sides[b], begin, end)
                                             : share_of<float>(g, sides[b], begin, end);
    });
    for (size_t t = 0; t < tasks.size(); ++t) {  // in this order whatever the threads
        Agreement& total = totals[tasks[t].first];
        total.size += parts[t].size;
        total.difference += parts[t].difference;
        total.square += parts[t].square;
    }
    for (size_t b = 0; b < totals.size(); ++b) {
        Agreement& t = totals[b];
        t = {std::sqrt(t.size), std::sqrt(t.difference), std::sqrt(sides[b].rows), t.square};
    }
    return totals;
}

}  // namespace fishleg::cpu
