// Packed products on every engine that this processor has, in memory of just the size, against loops in double.
#include "cpu/gemm/products.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "check.h"

using namespace fishleg::cpu;

namespace {

std::mt19937 generator(0);

/// Memory that the sanitizer guards at both ends, of NaN.
struct Memory {
    explicit Memory(int64_t bytes) : size(bytes), data(new unsigned char[bytes]) { std::fill_n(data.get(), bytes, 0xff); }
    bool operator==(const Memory& other) const { return std::equal(data.get(), data.get() + size, other.data.get()); }
    int64_t size;
    std::unique_ptr<unsigned char[]> data;
};

/// Numbers that every engine's operands hold exactly.
std::vector<float> numbers(int64_t count) {
    std::uniform_int_distribution<int> some(-64, 64);
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(some(generator)) / 16;
    return values;
}

Memory packed(const Engine& engine, Side side, const Lanes& from) {
    Memory memory(packed_size(engine, from.lanes, from.depth));
    pack(engine, {{side, from, memory.data.get()}}, 2);
    return memory;
}

void one(const Engine& engine, int64_t m, int64_t k, int64_t n, bool transposed) {
    const auto x = numbers(m * k), y = numbers(k * n);
    const auto layout = [&](const std::vector<float>& from, int64_t lanes) {
        return transposed ? Lanes{from.data(), lanes, k, 1, lanes} : Lanes{from.data(), lanes, k, k, 1};
    };
    const Memory left = packed(engine, Side::left, layout(x, m)), right = packed(engine, Side::right, layout(y, n));
    std::vector<float> out(m * n, NAN);
    Product product{left.data.get(), right.data.get(), m, n, k, Target::matrix, out.data(), n};
    multiply(engine, {product}, 2);
    bool ok = true;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            double want = 0;
            for (int64_t d = 0; d < k; ++d)
                want += transposed ? double(x[d * m + i]) * y[d * n + j] : double(x[i * k + d]) * y[j * k + d];
            ok = ok && out[i * n + j] == want;  // such sums are exact
        }
    CHECK(ok);
    for (Side side : {Side::left, Side::right}) {  // packed at once, or after having been a matrix
        const bool by_rows = side == Side::left;
        Memory direct(packed_size(engine, by_rows ? m : n, by_rows ? n : m));
        product.target = by_rows ? Target::left : Target::right;
        product.out = direct.data.get();
        multiply(engine, {product}, 2);
        const Lanes of = by_rows ? Lanes{out.data(), m, n, n, 1} : Lanes{out.data(), n, m, 1, n};
        CHECK(direct == packed(engine, side, of));
    }
}

void symmetric(const Engine& engine, int64_t n) {
    const auto x = numbers(n * 40);
    const Lanes from{x.data(), n, 40, 40, 1};
    const Memory left = packed(engine, Side::left, from), right = packed(engine, Side::right, from);
    std::vector<float> whole(n * n, NAN), half(n * n, NAN);
    Product product{left.data.get(), right.data.get(), n, n, 40, Target::matrix, whole.data(), n};
    multiply(engine, {product}, 2);
    product.symmetric = true, product.out = half.data();
    multiply(engine, {product}, 2);
    CHECK(whole == half);
}

/// c + XY, as c = 0 + XY twice.
void add(const Engine& engine) {
    const auto x = numbers(panel * 70), y = numbers(panel * 70);
    const Memory left = packed(engine, Side::left, {x.data(), panel, 70, 70, 1});
    const Memory right = packed(engine, Side::right, {y.data(), panel, 70, 70, 1});
    std::vector<float> once(panel * panel, NAN), twice;
    alignas(64) char saved[64];
    engine.enter(saved);
    engine.microkernel(left.data.get(), right.data.get(), 70, panel, panel, once.data(), panel, false);
    twice = once;
    engine.microkernel(left.data.get(), right.data.get(), 70, panel, panel, twice.data(), panel, true);
    engine.leave(saved);
    bool ok = true;
    for (int64_t e = 0; e < panel * panel; ++e) ok = ok && twice[e] == 2 * once[e];
    CHECK(ok);
}

}  // namespace

int main() {
    for (const Engine* engine : engines()) {
        std::printf("engine: %s\n", engine->name);
        CHECK(&engine_of(engine->name) == engine);
        for (auto [m, k, n] : {std::tuple<int64_t, int64_t, int64_t>{1, 1, 1}, {5, 31, 33}, {32, 32, 32}, {40, 130, 65},
                               {100, 17, 3}, {3, 300, 129}, {4, 0, 40}, {0, 3, 5}, {3, 5, 0}})
            for (bool transposed : {false, true}) one(*engine, m, k, n, transposed);
        for (int64_t n : {1, 32, 33, 100}) symmetric(*engine, n);
        add(*engine);
    }
    CHECK_THROWS(engine_of("abacus"), "but is: abacus");
    return check::failures() ? 1 : 0;
}
