// Moments and their roots against sums in float64, with every engine that the processor has.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/anchor/inverse_root.h"
#include "cpu/anchor/moments.h"
#include "numbers.h"

using namespace fishleg::cpu;

namespace {

/// One block: exact sizes, so that the sanitizers see what is beyond.
struct Layer {
    int64_t m, n, positions;
    Numbers e, a, rows, columns, R, L;

    Layer(int64_t m, int64_t n, int64_t positions)
        : m(m), n(n), positions(positions), e(random_numbers(positions * m, 1)), a(random_numbers(positions * n, 2)),
          rows(m * m), columns(n * n), R(m * m, 7), L(n * n, 7) {}

    Moments moments(float beta) {
        const float alpha = (1 - beta) / static_cast<float>(positions);
        return {{e.data(), positions, m, m, rows.data(), m, alpha, beta},
                {a.data(), positions, n, n, columns.data(), n, alpha, beta}};
    }
    KfacStart start() {
        return {{rows.data(), R.data(), m, 1, m}, {columns.data(), L.data(), n, 1, n}, 0.5, 0.01};
    }
};

double wanted_moment(const Numbers& x, int64_t positions, int64_t size, int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t p = 0; p < positions; ++p) sum += static_cast<double>(x[p * size + i]) * x[p * size + j];
    return 0.5 * sum / static_cast<double>(positions);
}

/// How far XᵀX (moment/weight + shift I) is from a multiple of the identity, of X (k, k) or its transpose.
double distance(const Numbers& moment, const Numbers& x, int64_t k, bool transposed, double shift) {
    std::vector<double> product(k * k), inverse(k * k);
    const auto at = [&](int64_t i, int64_t j) { return static_cast<double>(transposed ? x[j * k + i] : x[i * k + j]); };
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
            for (int64_t l = 0; l < k; ++l) inverse[i * k + j] += at(l, i) * at(l, j);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
            for (int64_t l = 0; l < k; ++l)
                product[i * k + j] += inverse[i * k + l] * (moment[l * k + j] / 0.5 + (l == j ? shift : 0));
    double worst = 0;
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) worst = std::max(worst, std::fabs(product[i * k + j] / product[0] - (i == j)));
    return worst;
}

double mean_diagonal(const Numbers& x, int64_t k) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += x[i * (k + 1)] / 0.5;
    return sum / static_cast<double>(k);
}

void anchors(const Engine& engine) {
    for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 33}, {31, 64}, {100, 7}, {65, 130}}) {
        Layer layer(m, n, 37), same(m, n, 37);
        CHECK(average(engine, {layer.moments(0.5f)}, 2) == std::vector<char>{1});
        CHECK(average(engine, {same.moments(0.5f)}, 1) == std::vector<char>{1});
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j)
                CHECK(std::fabs(layer.rows[i * m + j] - wanted_moment(layer.e, 37, m, i, j)) < 0.02);
        CHECK(start_kfac(engine, {layer.start()}, 2) == std::vector<char>{1});
        CHECK(start_kfac(engine, {same.start()}, 1) == std::vector<char>{1});
        CHECK(layer.R == same.R && layer.L == same.L && layer.columns == same.columns);
        const double pi = std::sqrt(mean_diagonal(layer.columns, n) / mean_diagonal(layer.rows, m));
        // bfloat16 alone is too coarse, and not used for roots.
        const double close = engine.element_bytes == 2 ? 0.2 : 1e-3;
        CHECK(distance(layer.rows, layer.R, m, false, 0.1 / pi) < close);
        CHECK(distance(layer.columns, layer.L, n, true, 0.1 * pi) < close);
    }
}

/// A side in two parts of 16 is two sides of 16, but for what they share: π and their size.
void parts(const Engine& engine) {
    const Numbers a = random_numbers(37 * 31, 2), e = random_numbers(37 * 20, 1);
    Numbers rows(20 * 20), columns(2 * 16 * 16), R(20 * 20), L(2 * 16 * 16);
    const float alpha = 0.5f / 37;
    const Moments moments{{e.data(), 37, 20, 20, rows.data(), 20, alpha, 0.5f},
                          {a.data(), 37, 16, 31, columns.data(), 16, alpha, 0.5f},
                          {a.data() + 16, 37, 15, 31, columns.data() + 256, 16, alpha, 0.5f}};
    CHECK(average(engine, {moments}, 2) == std::vector<char>{1});
    const KfacStart start{{rows.data(), R.data(), 20, 1, 20}, {columns.data(), L.data(), 31, 2, 16}, 0.5, 0.01};
    CHECK(start_kfac(engine, {start}, 2) == std::vector<char>{1});
    double trace = 0;
    for (int64_t part = 0; part < 2; ++part)
        for (int64_t i = 0; i < 16; ++i) trace += columns[part * 256 + i * 17] / 0.5;
    const double pi = std::sqrt(trace / 31 / mean_diagonal(rows, 20));
    const double close = engine.element_bytes == 2 ? 0.2 : 1e-3;
    for (int64_t part = 0; part < 2; ++part) {
        const Numbers moment(columns.begin() + part * 256, columns.begin() + (part + 1) * 256);
        const Numbers root(L.begin() + part * 256, L.begin() + (part + 1) * 256);
        CHECK(distance(moment, root, 16, true, 0.1 * pi) < close);
    }
    CHECK(columns[511] == 0);
}

void nothing_is_written(const Engine& engine) {
    Layer layer(40, 50, 9), before = layer;
    layer.a[449] = std::numeric_limits<float>::quiet_NaN();
    CHECK(average(engine, {layer.moments(0.5f)}, 2) == std::vector<char>{0});
    CHECK(layer.rows == before.rows && layer.columns == before.columns);
    CHECK(average(engine, {before.moments(0.5f)}, 2) == std::vector<char>{1});
    const Numbers R = before.R, L = before.L;
    before.rows[39 * 41] = -3;
    CHECK(start_kfac(engine, {before.start()}, 2) == std::vector<char>{0});
    before.rows[39 * 41] = std::numeric_limits<float>::infinity();
    CHECK(start_kfac(engine, {before.start()}, 2) == std::vector<char>{0});
    CHECK(before.R == R && before.L == L);
}

}  // namespace

int main() {
    for (const Engine* engine : engines()) {
        std::printf("engine: %s\n", engine->name);
        anchors(*engine);
        parts(*engine);
        nothing_is_written(*engine);
        CHECK(average(*engine, {}, 2).empty() && start_kfac(*engine, {}, 2).empty());
    }
    return check::failures() ? 1 : 0;
}
