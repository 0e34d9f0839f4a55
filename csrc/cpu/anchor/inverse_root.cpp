// X = C⁻¹ with C Cᵀ = F/weight + shift I, in blocks of 32 × 32, each product over all of its depth at once:
//
//     C_ip = (F_ip − Σ_{q<p} C_iq C_pqᵀ) X_ppᵀ        X_pc = (Σ_{c<q≤p} X_pq (−C_qc)) X_cc
//
// X_pp comes from `leaf`. X is found by rows, so that X C = I + E with a small E, and Q = XᵀX = C⁻ᵀ(I + E)ᵀ(I + E)C⁻¹ is
// right relative to itself in every direction; by columns it would be C X, and Q wrong where it is small.
//
// C is kept as the operands that it will be: −C and Cᵀ for the first, −C on the right for the second.
// Zeros are neither stored nor multiplied.
#include "cpu/anchor/inverse_root.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/common/tiles.h"
#include "cpu/anchor/tile_inverse_root.h"
#include "cpu/common/workspace.h"
#include "cpu/common/threads.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t area = panel * panel;      // of a block
constexpr int64_t together = 1 << 20;        // bytes of panels that stay in cache while others meet them
constexpr int64_t kept = int64_t{80} << 20;  // bytes of workspace; more only for a single layer
// 32 × 32 numbers in a row, rows or columns being the lanes.
constexpr Lanes lanes_by_rows{nullptr, panel, panel, panel, 1}, lanes_by_columns{nullptr, panel, panel, 1, panel};

Lanes of(const float* c, Lanes lanes) {
    lanes.source = c;
    return lanes;
}

struct Factor {
    const float* moment;
    int64_t k, panels;
    int64_t width;  // panels that go together, between two barriers
    float scale, shift;
    char *rows, *turned, *columns;   // −C as a left operand, Cᵀ and −C as right ones: without the diagonal
    char *inverse_turned, *inverse;  // X_ppᵀ and X_pp as right operands
    float* inverses;                 // X_pp
    float* out;                      // c X, or its transpose
    bool transposed;
    float c;
    bool failed;
};

/// Where block (i, p) of C is, for i > p, row after row of blocks; and column after column.
int64_t by_row(int64_t i, int64_t p) { return i * (i - 1) / 2 + p; }
int64_t by_column(const Factor& f, int64_t i, int64_t p) { return p * (2 * f.panels - p - 1) / 2 + i - p - 1; }

int64_t workspace(const Engine& engine, int64_t k) {
    const int64_t panels = (k + panel - 1) / panel;
    return area * (3 * by_row(panels, 0) * engine.size + panels * (2 * engine.size + 4));
}

/// Σ of the diagonal.
double trace(const float* x, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[i * (k + 1)];
    return sum;
}

/// c += block (i, p) of F/weight + shift I, which beyond its edges is the identity.
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
struct Work {
    const Engine& engine;
    const int64_t bytes = area * engine.size;  // of a block as an operand
    bool (*const leaf)(float*, float*) = cpu::leaf();

    /// c = XY, whole: what is beyond a factor's edges is 1 on its diagonal, and 0 beside that.
    void multiply(const void* left, const void* right, int64_t depth, float* c) const {
        engine.block(left, right, depth, panel, panel, c, panel, false);
    }

    /// c = F_ip − Σ_{q<p} C_iq C_pqᵀ
    void residual(const Factor& f, int64_t i, int64_t p, float* c) const {
        if (i * panel + panel <= f.k) expect(f.moment + i * panel * f.k + p * panel, f.k);
        multiply(f.rows + by_row(i, 0) * bytes, f.turned + by_row(p, 0) * bytes, p * panel, c);
        add(f, i, p, c);
    }

    /// C_ip, as all three operands, for i > p.
    void column(const Factor& f, int64_t i, int64_t p) const {
        alignas(64) float c[area];
        alignas(64) char operand[area * 4];
        residual(f, i, p, c);
        engine.pack(Side::left, of(c, lanes_by_rows), operand);
        multiply(operand, f.inverse_turned + p * bytes, panel, c);
        engine.pack(Side::right, of(c, lanes_by_rows), f.turned + by_row(i, p) * bytes);
        for (float& x : c) x = -x;
        engine.pack(Side::left, of(c, lanes_by_rows), f.rows + by_row(i, p) * bytes);
        engine.pack(Side::right, of(c, lanes_by_columns), f.columns + by_column(f, i, p) * bytes);
    }

    /// Panels first … last − 1 of C as far as the diagonal blocks: their own rows.
    void diagonal(Factor& f, int64_t first, int64_t last) const {
        for (int64_t p = first; p < last; ++p) {
            alignas(64) float c[area];
            residual(f, p, p, c);
            float* x = f.inverses + p * area;
            if (!leaf(c, x)) {
                f.failed = true;
                return;
            }
            engine.pack(Side::right, of(x, lanes_by_rows), f.inverse_turned + p * bytes);
            engine.pack(Side::right, of(x, lanes_by_columns), f.inverse + p * bytes);
            for (int64_t i = p + 1; i < last; ++i) column(f, i, p);
        }
    }

    /// Rows first … last − 1 (panels) of X, into λ.
    void inverse(const Factor& f, int64_t first, int64_t last) const {
        thread_local Memory memory;
        char* rows = memory.room((last - first) * last * bytes);  // of X, as left operands
        alignas(64) float c[area];
        alignas(64) char operand[area * 4];
        zeros(f, first, last);
        for (int64_t q = last - 1; q >= 0; --q) {
            for (int64_t p = std::max(first, q); p < last; ++p) {
                char* row = rows + (p - first) * last * bytes;
                const float* x = f.inverses + p * area;
                if (p != q) {
                    if (p * panel + panel <= f.k) expect(place_of(f, p, q), f.k);
                    const int64_t depth = (p - q) * panel;
                    multiply(row + (q + 1) * bytes, f.columns + by_column(f, q + 1, q) * bytes, depth, c);
                    engine.pack(Side::left, of(c, lanes_by_rows), operand);
                    multiply(operand, f.inverse + q * bytes, panel, c);
                    x = c;
                }
                engine.pack(Side::left, of(x, lanes_by_rows), row + q * bytes);
                write(f, p, q, x);
            }
        }
        memory.keep(kept / 8);
    }

    /// Where block (p, q) of X goes, as it is or transposed.
    static float* place_of(const Factor& f, int64_t p, int64_t q) {
        return f.out + (f.transposed ? q * f.k + p : p * f.k + q) * panel;
    }

    /// What is beside the diagonal blocks in the rows of panels first … last − 1, where X or Xᵀ has nothing.
    static void zeros(const Factor& f, int64_t first, int64_t last) {
        for (int64_t r = first * panel; r < std::min(f.k, last * panel); ++r) {
            const int64_t diagonal = r / panel * panel;
            const int64_t begin = f.transposed ? 0 : diagonal + panel, end = f.transposed ? diagonal : f.k;
            if (begin < end) std::fill(f.out + r * f.k + begin, f.out + r * f.k + end, 0.f);
        }
    }

    /// x, block (p, q) of X, to where it goes.
    static void write(const Factor& f, int64_t p, int64_t q, const float* x) {
        alignas(64) float turned[area];
        float* to = place_of(f, p, q);
        if (f.transposed) {
            transpose(x, panel, turned, panel);
            x = turned;
            std::swap(p, q);
        }
        const int64_t rows = std::min(panel, f.k - p * panel), columns = std::min(panel, f.k - q * panel);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 0; s < columns; ++s) to[r * f.k + s] = f.c * x[r * panel + s];
    }
};

/// f(task) for all of them, the long ones first, on threads that have the engine.
template <class Task, class F>
void each(const Engine& engine, std::vector<Task>& tasks, int threads, F f) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.length > b.length; });
    parallel_for_uneven(static_cast<int64_t>(tasks.size()), threads, [&](int64_t t) {
        alignas(64) char saved[64];
        engine.enter(saved);
        f(tasks[t]);
        engine.leave(saved);
    });
}

struct Task {
    Factor* factor;
    int64_t first, last;
    int64_t length;
};

/// C of all factors, a few of its columns in each at a time; those that have none are marked.
void factorise(const Work& work, std::vector<Factor>& factors, int threads) {
    int64_t steps = 0;
    for (const Factor& f : factors) steps = std::max(steps, (f.panels + f.width - 1) / f.width);
    for (int64_t step = 0; step < steps; ++step) {
        std::vector<Task> diagonals, rows;
        for (Factor& f : factors) {
            const int64_t first = step * f.width, last = std::min(first + f.width, f.panels);
            if (first < last && !f.failed) diagonals.push_back({&f, first, last, f.k});
        }
        each(work.engine, diagonals, threads, [&](const Task& t) { work.diagonal(*t.factor, t.first, t.last); });
        for (const Task& t : diagonals)
            for (int64_t i = t.last; i < t.factor->panels && !t.factor->failed; ++i)
                rows.push_back({t.factor, i, i + 1, t.length});
        each(work.engine, rows, threads, [&](const Task& t) {
            const int64_t first = step * t.factor->width;
            for (int64_t p = first; p < first + t.factor->width; ++p) work.column(*t.factor, t.first, p);
        });
    }
}

/// ‖diagonal of X‖/√k
double size(const Factor& f) {
    double sum = 0;
    for (int64_t i = 0; i < f.k; ++i) {
        const double x = f.inverses[i / panel * area + i % panel * (panel + 1)];
        sum += x * x;
    }
    return std::sqrt(sum / static_cast<double>(f.k));
}

/// Two factors of each block: all in one workspace.
void start(const Work& work, std::vector<Factor>& factors, Memory& memory, int threads) {
    int64_t total = 0;
    for (const Factor& f : factors) total += workspace(work.engine, f.k);
    char* room = memory.room(total);
    const auto take = [&](int64_t blocks, int64_t size) {
        char* mine = room;
        room += blocks * area * size;
        return mine;
    };
    for (Factor& f : factors) {
        for (char** operand : {&f.rows, &f.turned, &f.columns}) *operand = take(by_row(f.panels, 0), work.engine.size);
        for (char** operand : {&f.inverse_turned, &f.inverse}) *operand = take(f.panels, work.engine.size);
        f.inverses = reinterpret_cast<float*>(take(f.panels, 4));
    }
    factorise(work, factors, threads);
    std::vector<Task> tasks;
    for (size_t k = 0; k < factors.size(); k += 2) {
        Factor &r = factors[k], &l = factors[k + 1];
        r.failed = l.failed = r.failed || l.failed;
        if (r.failed) continue;
        r.c = static_cast<float>(std::sqrt(size(l) / size(r)));
        l.c = 1 / r.c;
        for (Factor* f : {&r, &l}) {
            for (int64_t first = 0; first < f->panels; first += f->width) {
                const int64_t last = std::min(first + f->width, f->panels);
                tasks.push_back({f, first, last, last * last});
            }
        }
    }
    each(work.engine, tasks, threads, [&](const Task& t) { work.inverse(*t.factor, t.first, t.last); });
}

}  // namespace

std::vector<char> start_kfac(const Engine& engine, const std::vector<KfacStart>& blocks, int threads) {
    thread_local Memory memory;
    const Work work{engine};
    std::vector<char> done(blocks.size(), 0);
    for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
        std::vector<Factor> factors;
        std::vector<size_t> indices;
        int64_t bytes = 0;
        for (; end < blocks.size(); ++end) {
            const KfacStart& b = blocks[end];
            bytes += workspace(engine, b.m) + workspace(engine, b.n);
            if (end > begin && bytes > kept) break;
            constexpr double tiny = std::numeric_limits<float>::min();
            const double g = std::max(trace(b.rows, b.m) / b.weight / static_cast<double>(b.m), tiny);
            const double a = std::max(trace(b.columns, b.n) / b.weight / static_cast<double>(b.n), tiny);
            if (!std::isfinite(g) || !std::isfinite(a)) continue;
            const double pi = std::sqrt(a / g), root = std::sqrt(b.damping);
            const auto add = [&](const float* moment, int64_t k, double shift, float* out, bool transposed) {
                Factor f{};
                f.moment = moment, f.k = k, f.panels = (k + panel - 1) / panel;
                f.width = std::clamp<int64_t>(together / (f.panels * area * engine.size), 1, 8);
                f.scale = static_cast<float>(1 / b.weight), f.shift = static_cast<float>(shift);
                f.out = out, f.transposed = transposed;
                factors.push_back(f);
            };
            add(b.rows, b.m, root / pi, b.R, false);
            add(b.columns, b.n, root * pi, b.L, true);
            indices.push_back(end);
        }
        start(work, factors, memory, threads);
        for (size_t k = 0; k < indices.size(); ++k) done[indices[k]] = !factors[2 * k].failed;
    }
    memory.keep(kept);
    return done;
}

}  // namespace fishleg::cpu
