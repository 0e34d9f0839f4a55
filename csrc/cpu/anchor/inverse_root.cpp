// X = C⁻¹ with C Cᵀ = F/weight + shift I, in tiles of 32 × 32, each product over all of its depth at once:
//
//     C_ip = (F_ip − Σ_{q<p} C_iq C_pqᵀ) X_ppᵀ        X_pc = (Σ_{c<q≤p} X_pq (−C_qc)) X_cc
//
// X_pp comes from tile_inverse_root.h. X is found by rows, so that X C = I + E with a small E, and
// Q = XᵀX = C⁻ᵀ(I + E)ᵀ(I + E)C⁻¹ is right relative to itself in every direction; by columns it would be C X, and Q wrong
// where it is small.
//
// C is kept as the operands that it will be: −C and Cᵀ for the first, −C on the right for the second.
// Zeros are neither stored nor multiplied.
#include "cpu/anchor/inverse_root.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/anchor/tile_inverse_root.h"
#include "cpu/common/threads.h"
#include "cpu/common/tiles.h"
#include "cpu/common/workspace.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t area = panel * panel;                 // of a tile
constexpr int64_t cache_bytes = 1 << 20;                // of panels that stay in cache while others meet them
constexpr int64_t workspace_bytes = int64_t{80} << 20;  // more only for a single layer
// A tile without gaps, its rows or its columns being the lanes.
constexpr Lanes lanes_by_rows{nullptr, panel, panel, panel, 1}, lanes_by_columns{nullptr, panel, panel, 1, panel};

Lanes of(const float* c, Lanes lanes) {
    lanes.source = c;
    return lanes;
}

struct Factor {
    const float* moment;
    int64_t k, panels;
    int64_t real;   // rows that are no padding
    int64_t width;  // of a step between two barriers, in panels
    float scale, shift;
    // Packed operands, of C without the diagonal and of X with it alone:
    char* minus_C_left;
    char* C_transposed_right;
    char* minus_C_right;
    char* X_transposed_right;
    char* X_right;
    float* X_diagonal;  // the X_pp as they are
    float* out;         // c X, or its transpose
    bool transposed;
    float c;
    bool failed;
};

/// Where tile (i, p) of C is, for i > p, row after row of tiles; and column after column.
int64_t by_row(int64_t i, int64_t p) { return i * (i - 1) / 2 + p; }
int64_t by_column(const Factor& f, int64_t i, int64_t p) { return p * (2 * f.panels - p - 1) / 2 + i - p - 1; }

int64_t workspace_of(const Engine& engine, int64_t k) {
    const int64_t panels = (k + panel - 1) / panel;
    return area * (3 * by_row(panels, 0) * engine.element_bytes + panels * (2 * engine.element_bytes + 4));
}

/// Σ of the diagonal.
double trace(const float* x, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[i * (k + 1)];
    return sum;
}

/// c += tile (i, p) of F/weight + shift I, which beyond its edges is the identity.
void add(const Factor& f, int64_t i, int64_t p, float* c) {
    const int64_t rows = std::min(panel, f.k - i * panel), columns = std::min(panel, f.k - p * panel);
    const float* from = f.moment + i * panel * f.k + p * panel;
    if (rows == panel && columns == panel) {
        for (int64_t r = 0; r < panel; ++r)
            for (int64_t s = 0; s < panel; ++s) c[r * panel + s] += f.scale * from[r * f.k + s];
    } else {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < columns; ++s) c[r * panel + s] += f.scale * from[r * f.k + s];
    }
    for (int64_t r = 0; r < panel && i == p; ++r) c[r * (panel + 1)] += r < rows ? f.shift : 1;
}

/// What both stages do for one factor, with operands of one engine.
struct FactorKernels {
    const Engine& engine;
    const int64_t bytes = area * engine.element_bytes;  // of a tile as an operand
    bool (*const inverse_root_of_tile)(float*, float*) = tile_inverse_root();

    /// c = XY, whole: what is beyond a factor's edges is 1 on its diagonal, and 0 beside that.
    void multiply(const void* left, const void* right, int64_t depth, float* c) const {
        engine.microkernel(left, right, depth, panel, panel, c, panel, false);
    }

    /// c = F_ip − Σ_{q<p} C_iq C_pqᵀ
    void residual(const Factor& f, int64_t i, int64_t p, float* c) const {
        if (i * panel + panel <= f.k) prefetch_tile(f.moment + i * panel * f.k + p * panel, f.k);
        multiply(f.minus_C_left + by_row(i, 0) * bytes, f.C_transposed_right + by_row(p, 0) * bytes, p * panel, c);
        add(f, i, p, c);
    }

    /// C_ip, as all three operands, for i > p.
    void column(const Factor& f, int64_t i, int64_t p) const {
        alignas(64) float c[area];
        alignas(64) char operand[area * 4];
        residual(f, i, p, c);
        engine.pack(Side::left, of(c, lanes_by_rows), operand);
        multiply(operand, f.X_transposed_right + p * bytes, panel, c);
        engine.pack(Side::right, of(c, lanes_by_rows), f.C_transposed_right + by_row(i, p) * bytes);
        for (float& x : c) x = -x;
        engine.pack(Side::left, of(c, lanes_by_rows), f.minus_C_left + by_row(i, p) * bytes);
        engine.pack(Side::right, of(c, lanes_by_columns), f.minus_C_right + by_column(f, i, p) * bytes);
    }

    /// Panels first … last − 1 of C as far as the diagonal tiles: their own rows.
    void diagonal(Factor& f, int64_t first, int64_t last) const {
        for (int64_t p = first; p < last; ++p) {
            alignas(64) float c[area];
            residual(f, p, p, c);
            float* x = f.X_diagonal + p * area;
            if (!inverse_root_of_tile(c, x)) {
                f.failed = true;
                return;
            }
            engine.pack(Side::right, of(x, lanes_by_rows), f.X_transposed_right + p * bytes);
            engine.pack(Side::right, of(x, lanes_by_columns), f.X_right + p * bytes);
            for (int64_t i = p + 1; i < last; ++i) column(f, i, p);
        }
    }

    /// Rows first … last − 1 (panels) of X, into λ.
    void inverse(const Factor& f, int64_t first, int64_t last) const {
        thread_local Workspace workspace;
        char* rows = workspace.reserve((last - first) * last * bytes);  // of X, as left operands
        alignas(64) float c[area];
        alignas(64) char operand[area * 4];
        zeros(f, first, last);
        for (int64_t q = last - 1; q >= 0; --q) {
            for (int64_t p = std::max(first, q); p < last; ++p) {
                char* row = rows + (p - first) * last * bytes;
                const float* x = f.X_diagonal + p * area;
                if (p != q) {
                    if (p * panel + panel <= f.k) prefetch_tile(place_of(f, p, q), f.k);
                    const int64_t depth = (p - q) * panel;
                    multiply(row + (q + 1) * bytes, f.minus_C_right + by_column(f, q + 1, q) * bytes, depth, c);
                    engine.pack(Side::left, of(c, lanes_by_rows), operand);
                    multiply(operand, f.X_right + q * bytes, panel, c);
                    x = c;
                }
                engine.pack(Side::left, of(x, lanes_by_rows), row + q * bytes);
                write(f, p, q, x);
            }
        }
        workspace.keep_at_most(workspace_bytes / 8);
    }

    /// Where tile (p, q) of X goes, as it is or transposed.
    static float* place_of(const Factor& f, int64_t p, int64_t q) {
        return f.out + (f.transposed ? q * f.k + p : p * f.k + q) * panel;
    }

    /// What is beside the diagonal tiles in the rows of panels first … last − 1, where X or Xᵀ has nothing.
    static void zeros(const Factor& f, int64_t first, int64_t last) {
        for (int64_t r = first * panel; r < std::min(f.k, last * panel); ++r) {
            const int64_t diagonal = r / panel * panel;
            const int64_t begin = f.transposed ? 0 : diagonal + panel, end = f.transposed ? diagonal : f.k;
            if (begin < end) std::fill(f.out + r * f.k + begin, f.out + r * f.k + end, 0.f);
        }
    }

    /// x, tile (p, q) of X, to where it goes.
    static void write(const Factor& f, int64_t p, int64_t q, const float* x) {
        alignas(64) float transposed[area];
        float* to = place_of(f, p, q);
        if (f.transposed) {
            transpose_tile(x, panel, transposed, panel);
            x = transposed;
            std::swap(p, q);
        }
        const int64_t rows = std::min(panel, f.k - p * panel), columns = std::min(panel, f.k - q * panel);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < columns; ++s) to[r * f.k + s] = f.c * x[r * panel + s];
    }
};

/// Panels first … last − 1 of a factor.
struct PanelRange {
    Factor* factor;
    int64_t first, last;
    int64_t cost;  // beside others'
};

/// f(range) for all of them, the costly ones first, on threads that have the engine.
template <class F>
void for_ranges(const Engine& engine, std::vector<PanelRange>& ranges, int threads, F f) {
    std::stable_sort(ranges.begin(), ranges.end(),
                     [](const PanelRange& a, const PanelRange& b) { return a.cost > b.cost; });
    parallel_for_uneven(static_cast<int64_t>(ranges.size()), threads, [&](int64_t r) {
        alignas(64) char saved[64];
        engine.enter(saved);
        f(ranges[r]);
        engine.leave(saved);
    });
}

/// C of all factors, a few of its columns in each at a time; those that have none are marked.
void factorise(const FactorKernels& work, std::vector<Factor>& factors, int threads) {
    int64_t steps = 0;
    for (const Factor& f : factors) steps = std::max(steps, (f.panels + f.width - 1) / f.width);
    for (int64_t step = 0; step < steps; ++step) {
        std::vector<PanelRange> diagonals, rows;
        for (Factor& f : factors) {
            const int64_t first = step * f.width, last = std::min(first + f.width, f.panels);
            if (first < last && !f.failed) diagonals.push_back({&f, first, last, f.k});
        }
        for_ranges(work.engine, diagonals, threads,
                   [&](const PanelRange& r) { work.diagonal(*r.factor, r.first, r.last); });
        for (const PanelRange& r : diagonals)
            for (int64_t i = r.last; i < r.factor->panels && !r.factor->failed; ++i)
                rows.push_back({r.factor, i, i + 1, r.cost});
        for_ranges(work.engine, rows, threads, [&](const PanelRange& r) {
            const int64_t first = step * r.factor->width;
            for (int64_t p = first; p < first + r.factor->width; ++p) work.column(*r.factor, r.first, p);
        });
    }
}

/// Where the factors of a block's rows begin and end, and where those of its columns do.
struct FactorsOfBlock {
    size_t begin, middle, end;
};

/// ‖diagonal of X‖/√k, of the diagonal blocks begin … end−1 of X
double size(const std::vector<Factor>& factors, size_t begin, size_t end) {
    double sum = 0;
    int64_t k = 0;
    for (size_t part = begin; part < end; ++part) {
        const Factor& f = factors[part];
        for (int64_t i = 0; i < f.real; ++i) {
            const double x = f.X_diagonal[i / panel * area + i % panel * (panel + 1)];
            sum += x * x;
        }
        k += f.real;
    }
    return std::sqrt(sum / static_cast<double>(k));
}

/// All factors of some blocks, in one workspace. Returns of each block whether that was done.
std::vector<char> start(const FactorKernels& work, std::vector<Factor>& factors,
                        const std::vector<FactorsOfBlock>& blocks, Workspace& workspace, int threads) {
    int64_t total = 0;
    for (const Factor& f : factors) total += workspace_of(work.engine, f.k);
    char* next = workspace.reserve(total);
    const auto take = [&](int64_t tiles, int64_t element_bytes) {
        char* mine = next;
        next += tiles * area * element_bytes;
        return mine;
    };
    for (Factor& f : factors) {
        for (char** operand : {&f.minus_C_left, &f.C_transposed_right, &f.minus_C_right})
            *operand = take(by_row(f.panels, 0), work.engine.element_bytes);
        for (char** operand : {&f.X_transposed_right, &f.X_right})
            *operand = take(f.panels, work.engine.element_bytes);
        f.X_diagonal = reinterpret_cast<float*>(take(f.panels, 4));
    }
    factorise(work, factors, threads);
    std::vector<PanelRange> ranges;
    std::vector<char> done;
    for (const auto& [begin, middle, end] : blocks) {
        const auto first_of = [&](size_t k) { return factors.begin() + static_cast<std::ptrdiff_t>(k); };
        done.push_back(std::none_of(first_of(begin), first_of(end), [](const Factor& f) { return f.failed; }));
        if (!done.back()) continue;
        const auto c = static_cast<float>(std::sqrt(size(factors, middle, end) / size(factors, begin, middle)));
        for (size_t k = begin; k < end; ++k) {
            Factor& f = factors[k];
            f.c = k < middle ? c : 1 / c;
            for (int64_t first = 0; first < f.panels; first += f.width) {
                const int64_t last = std::min(first + f.width, f.panels);
                ranges.push_back({&f, first, last, last * last});
            }
        }
    }
    for_ranges(work.engine, ranges, threads,
               [&](const PanelRange& r) { work.inverse(*r.factor, r.first, r.last); });
    return done;
}

/// tr F/k
double mean_eigenvalue(const KfacSide& side, double weight) {
    double sum = 0;
    for (int64_t part = 0; part < side.parts; ++part)
        sum += trace(side.moment + part * side.width * side.width, side.width);
    return std::max<double>(sum / weight / static_cast<double>(side.size), std::numeric_limits<float>::min());
}

}  // namespace

std::vector<char> start_kfac(const Engine& engine, const std::vector<KfacStart>& blocks, int threads) {
    thread_local Workspace workspace;
    const FactorKernels work{engine};
    std::vector<char> done(blocks.size(), 0);
    for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
        std::vector<Factor> factors;
        std::vector<FactorsOfBlock> places;
        std::vector<size_t> indices;
        int64_t bytes = 0;
        for (; end < blocks.size(); ++end) {
            const KfacStart& b = blocks[end];
            for (const KfacSide* side : {&b.rows, &b.columns}) bytes += side->parts * workspace_of(engine, side->width);
            if (end > begin && bytes > workspace_bytes) break;
            const double g = mean_eigenvalue(b.rows, b.weight), a = mean_eigenvalue(b.columns, b.weight);
            if (!std::isfinite(g) || !std::isfinite(a)) continue;
            const double pi = std::sqrt(a / g), root = std::sqrt(b.damping);
            const auto add = [&](const KfacSide& side, double shift, bool transposed) {
                for (int64_t part = 0; part < side.parts; ++part) {
                    Factor f{};
                    f.moment = side.moment + part * side.width * side.width;
                    f.out = side.root + part * side.width * side.width;
                    f.k = side.width, f.panels = (side.width + panel - 1) / panel;
                    f.real = std::clamp<int64_t>(side.size - part * side.width, 0, side.width);
                    f.width = std::clamp<int64_t>(cache_bytes / (f.panels * area * engine.element_bytes), 1, 8);
                    f.scale = static_cast<float>(1 / b.weight), f.shift = static_cast<float>(shift);
                    f.transposed = transposed;
                    factors.push_back(f);
                }
            };
            const size_t first = factors.size();
            add(b.rows, root / pi, false);
            const size_t middle = factors.size();
            add(b.columns, root * pi, true);
            places.push_back({first, middle, factors.size()});
            indices.push_back(end);
        }
        const std::vector<char> right = start(work, factors, places, workspace, threads);
        for (size_t k = 0; k < indices.size(); ++k) done[indices[k]] = right[k];
    }
    workspace.keep_at_most(workspace_bytes);
    return done;
}

}  // namespace fishleg::cpu
