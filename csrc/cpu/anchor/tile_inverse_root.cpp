// See tile_inverse_root.h. FISHLEG_ISA is the instruction set that this is compiled for.
#include <cmath>
#include <cstdint>
#include <limits>

namespace fishleg::cpu::FISHLEG_ISA {

constexpr int64_t side = 32;

bool tile_inverse_root(float* __restrict a, float* __restrict x) {
    float pivots[side];
    for (int64_t k = 0; k < side; ++k) {  // rows of Cᵀ
        float* row = a + k * side;
        if (!(row[k] > 0) || row[k] > std::numeric_limits<float>::max()) return false;
        const float pivot = pivots[k] = 1 / std::sqrt(row[k]);
        for (int64_t j = 0; j < side; ++j) row[j] *= pivot;
        for (int64_t i = k + 1; i < side; ++i) {
            const float factor = row[i];
            for (int64_t j = 0; j < side; ++j) a[i * side + j] -= factor * row[j];
        }
    }
    alignas(64) float transposed[side * side] = {};
    for (int64_t i = side - 1; i >= 0; --i) {  // rows of Xᵀ, with Cᵀ Xᵀ = I
        float* row = transposed + i * side;
        for (int64_t k = i + 1; k < side; ++k) {
            const float factor = a[i * side + k];
            for (int64_t j = 0; j < side; ++j) row[j] -= factor * transposed[k * side + j];
        }
        row[i] = 1;
        for (int64_t j = 0; j < side; ++j) row[j] *= pivots[i];
    }
    for (int64_t i = 0; i < side; ++i)
        for (int64_t j = 0; j < side; ++j) x[i * side + j] = transposed[j * side + i];
    return true;
}

}  // namespace fishleg::cpu::FISHLEG_ISA
