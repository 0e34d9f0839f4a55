// Polar factors: rows that are orthonormal, and the same whatever the number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/step/polar.h"
#include "numbers.h"

using namespace fishleg::cpu;

namespace {

// Newton and Schulz's of degree 5, which bring all but the smallest singular values to 1.
const std::vector<std::array<float, 3>> newton_schulz(12, {1.875f, -1.25f, 0.375f});

/// How far XXᵀ, of the smaller side, is from the identity.
double distance(const Numbers& x, int64_t m, int64_t n) {
    const int64_t k = std::min(m, n), l = std::max(m, n);
    const auto at = [&](int64_t i, int64_t j) { return static_cast<double>(m <= n ? x[i * n + j] : x[j * n + i]); };
    double worst = 0;
    for (int64_t i = 0; i < k; ++i) {
        for (int64_t j = 0; j < k; ++j) {
            double sum = 0;
            for (int64_t p = 0; p < l; ++p) sum += at(i, p) * at(j, p);
            worst = std::max(worst, std::fabs(sum - (i == j)));
        }
    }
    return worst;
}

void factors(const Engine& engine) {
    for (const int64_t together : {1, 3, 5}) {
        // The last one is more than a thread has alone.
        for (const auto& [m, n] : {std::pair<int64_t, int64_t>{1, 1}, {1, 40}, {33, 1}, {31, 64}, {70, 33}, {40, 7000}}) {
            Numbers x = random_numbers(m * n, 3), same = x, other = random_numbers(5 * 9, 4);
            polar_factors(engine, {{x.data(), m, n, together}, {other.data(), 5, 9, 1}}, newton_schulz, 2);
            polar_factors(engine, {{same.data(), m, n, together}}, newton_schulz, 1);
            CHECK(x == same);
            CHECK(distance(x, m, n) < 1e-3 && distance(other, 5, 9) < 1e-3);
        }
    }
}

void odd_ones(const Engine& engine) {
    Numbers zeros(12), wrong(12, 1.0f), right = random_numbers(12, 5);
    wrong[7] = std::numeric_limits<float>::quiet_NaN();
    polar_factors(engine, {{zeros.data(), 3, 4, 3}, {wrong.data(), 3, 4, 3}, {right.data(), 3, 4, 3}, {nullptr, 0, 5, 1}},
                  newton_schulz, 2);
    CHECK(zeros == Numbers(12));
    CHECK(std::isnan(wrong[0] + wrong[5] + wrong[11]) && distance(right, 3, 4) < 1e-3);
    polar_factors(engine, {}, newton_schulz, 2);
}

}  // namespace

int main() {
    if (const Engine* engine = avx512_engine()) {
        factors(*engine);
        odd_ones(*engine);
    }
    return check::failures() ? 1 : 0;
}
