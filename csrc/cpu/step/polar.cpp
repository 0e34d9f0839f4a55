#include "cpu/step/polar.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/common/squares.h"
#include "cpu/common/threads.h"
#include "cpu/common/workspace.h"
#include "cpu/gemm/products.h"

namespace fishleg::cpu {
namespace {

constexpr int64_t small = int64_t{1} << 18;             // entries of a matrix that one thread keeps in its cache
constexpr int64_t workspace_bytes = int64_t{32} << 20;  // kept from call to call

double norm(const float* x, int64_t count) {
    constexpr int64_t at_once = 4096;  // of float32 sums
    double total = 0;
    for (int64_t i = 0; i < count; i += at_once) total += sum_of_squares(x + i, std::min(at_once, count - i));
    return std::sqrt(total);
}

void scale(float* x, int64_t count, double factor) {
    const auto by = static_cast<float>(factor);
    for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

/// X on its way, (k, l) with k ≤ l: x itself or its transpose.
class Iteration {
  public:
    Iteration(const Engine& engine, const PolarMatrix& of, Workspace& workspace, int threads)
        : engine_(engine), x_(of.x), wide_(of.m <= of.n), k_(std::min(of.m, of.n)), l_(std::max(of.m, of.n)),
          row_(of.n), threads_(threads) {
        const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
        const int64_t square = aligned(packed_size(engine, k_, k_)), matrix = aligned(k_ * k_ * 4);
        const int64_t long_side = aligned(std::max(packed_size(engine, k_, l_), packed_size(engine, l_, k_)));
        char* next = workspace.reserve(long_side + 2 * matrix + 5 * square);
        const auto take = [&](int64_t bytes) { return std::exchange(next, next + bytes); };
        packed_x_ = take(long_side);
        A_ = reinterpret_cast<float*>(take(matrix)), A2_ = reinterpret_cast<float*>(take(matrix));
        for (void** operand : {&packed_A_, &packed_B_, &packed_BA_, &whole_, &next_whole_}) *operand = take(square);
    }

    void run(const std::vector<std::array<float, 3>>& coefficients, int64_t together) {
        if (const double size = norm(x_, k_ * l_); size > 0) scale(x_, k_ * l_, 1 / size);
        const auto count = static_cast<int64_t>(coefficients.size());
        for (int64_t first = 0; first < count; first += together) {
            const int64_t end = std::min(count, first + together);
            pack_x(true);
            multiply_symmetric(packed_x_, packed_x_, l_, A_);
            for (int64_t step = first; step < end; ++step) {
                pack_square(A_, packed_A_);
                multiply_symmetric(packed_A_, packed_A_, k_, A2_);
                if (step == 0) bound();
                polynomial(coefficients[step]);
                pack_square(A2_, packed_B_);
                if (step == first) {
                    std::swap(packed_B_, whole_);
                    if (step + 1 < end) next_A(whole_);
                } else {
                    pack_product(packed_B_, whole_, next_whole_);
                    std::swap(whole_, next_whole_);
                    if (step + 1 < end) next_A(packed_B_);
                }
            }
            move();
        }
    }

  private:
    /// The rows of X as lanes, or its columns.
    void pack_x(bool rows) {
        const bool along = rows == wide_;  // depth runs along a row of x
        const Lanes from{x_, rows ? k_ : l_, rows ? l_ : k_, along ? row_ : 1, along ? 1 : row_};
        pack(engine_, {{Side::left, from, packed_x_}}, threads_);
    }

    void pack_square(const float* from, void* to) {
        pack(engine_, {{Side::left, {from, k_, k_, k_, 1}, to}}, threads_);
    }

    void multiply_symmetric(const void* left, const void* right, int64_t depth, float* out) {
        multiply(engine_, {product(left, right, k_, k_, depth, Target::matrix, out, k_, true)}, threads_);
    }

    /// Of symmetric matrices whose product is symmetric.
    void pack_product(const void* left, const void* right, void* out) {
        multiply(engine_, {product(left, right, k_, k_, k_, Target::left, out, 0, true)}, threads_);
    }

    static Product product(const void* left, const void* right, int64_t rows, int64_t columns, int64_t depth,
                           Target target, void* out, int64_t stride, bool symmetric) {
        Product p;
        p.left = left, p.right = right, p.rows = rows, p.columns = columns, p.depth = depth;
        p.target = target, p.out = out, p.stride = stride, p.symmetric = symmetric;
        p.beta = 0;
        return p;
    }

    /// Divide by ‖A²‖^¼, which bounds the largest singular value.
    void bound() {
        const double largest = std::sqrt(norm(A2_, k_ * k_));
        if (!(largest > 0)) return;
        scale(x_, k_ * l_, 1 / std::sqrt(largest));
        scale(A_, k_ * k_, 1 / largest);
        scale(A2_, k_ * k_, 1 / (largest * largest));
        pack_square(A_, packed_A_);
    }

    /// B in the place of A².
    void polynomial(const std::array<float, 3>& coefficients) {
        const auto [a, b, c] = coefficients;
        for (int64_t i = 0; i < k_ * k_; ++i) A2_[i] = c * A2_[i] + b * A_[i];
        for (int64_t i = 0; i < k_; ++i) A2_[i * (k_ + 1)] += a;
    }

    /// A ← B A B
    void next_A(const void* B) {
        pack_product(B, packed_A_, packed_BA_);
        multiply_symmetric(packed_BA_, B, k_, A_);
    }

    /// X ← (product of all B) X, in the layout of x.
    void move() {
        pack_x(false);
        const Product p = wide_ ? product(whole_, packed_x_, k_, l_, k_, Target::matrix, x_, row_, false)
                                : product(packed_x_, whole_, l_, k_, k_, Target::matrix, x_, row_, false);
        multiply(engine_, {p}, threads_);
    }

    const Engine& engine_;
    float* x_;
    bool wide_;
    int64_t k_, l_, row_;
    int threads_;
    void* packed_x_;
    float *A_, *A2_;
    void *packed_A_, *packed_B_, *packed_BA_, *whole_, *next_whole_;
};

void polar_factor(const Engine& engine, const PolarMatrix& of, const std::vector<std::array<float, 3>>& coefficients,
                  int threads) {
    if (of.m < 1 || of.n < 1) return;
    thread_local Workspace workspace;
    Iteration(engine, of, workspace, threads).run(coefficients, std::max<int64_t>(1, of.together));
    workspace.keep_at_most(workspace_bytes);
}

}  // namespace

void polar_factors(const Engine& engine, const std::vector<PolarMatrix>& matrices,
                   const std::vector<std::array<float, 3>>& coefficients, int threads) {
    std::vector<const PolarMatrix*> cached;
    for (const PolarMatrix& of : matrices) {
        if (of.m * of.n <= small) cached.push_back(&of);
        else polar_factor(engine, of, coefficients, threads);
    }
    std::stable_sort(cached.begin(), cached.end(), [](const PolarMatrix* a, const PolarMatrix* b) {
        return a->m * a->n * std::min(a->m, a->n) > b->m * b->n * std::min(b->m, b->n);
    });
    parallel_for_uneven(static_cast<int64_t>(cached.size()), threads,
                        [&](int64_t i) { polar_factor(engine, *cached[i], coefficients, 1); });
}

}  // namespace fishleg::cpu
