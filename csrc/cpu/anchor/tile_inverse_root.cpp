// See leaf.h. FISHLEG_ISA is the instruction set that this is compiled for.
#include <cmath>
#include <cstdint>
#include <limits>

namespace fishleg::cpu::FISHLEG_ISA {

constexpr int64_t panel = 32, area = panel * panel;

bool leaf(float* __restrict a, float* __restrict x) {
    float pivots[panel];
    for (int64_t k = 0; k < panel; ++k) {  // rows of Cᵀ
        float* row = a + k * panel;
        if (!(row[k] > 0) || row[k] > std::numeric_limits<float>::max()) return false;
        const float pivot = pivots[k] = 1 / std::sqrt(row[k]);
        for (int64_t j = 0; j < panel; ++j) row[j] *= pivot;
        for (int64_t i = k + 1; i < panel; ++i) {
            const float factor = row[i];
            for (int64_t j = 0; j < panel; ++j) a[i * panel + j] -= factor * row[j];
        }
    }
    alignas(64) float turned[area] = {};
    for (int64_t i = panel - 1; i >= 0; --i) {  // rows of Xᵀ, with Cᵀ Xᵀ = I
        float* row = turned + i * panel;
        for (int64_t k = i + 1; k < panel; ++k) {
            const float factor = a[i * panel + k];
            for (int64_t j = 0; j < panel; ++j) row[j] -= factor * turned[k * panel + j];
        }
        row[i] = 1;
        for (int64_t j = 0; j < panel; ++j) row[j] *= pivots[i];
    }
    for (int64_t i = 0; i < panel; ++i)
        for (int64_t j = 0; j < panel; ++j) x[i * panel + j] = turned[j * panel + i];
    return true;
}

}  // namespace fishleg::cpu::FISHLEG_ISA
