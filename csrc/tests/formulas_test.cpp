// formulas.h against the compiler's own 16-bit type, and against textbook arithmetic in double.
#include "formulas.h"

#include <initializer_list>
#include <limits>

#include "check.h"

using namespace fishleg;

namespace {

bool same(float a, float b) { return a == b || (a != a && b != b); }

/// 2^e, and what a 16-bit float of `fraction` stored bits makes of x: by exact arithmetic in double.
double rounded(double x, int fraction, int least, double largest) {
    if (x == 0 || !std::isfinite(x)) return x;
    int exponent = 0;
    std::frexp(x, &exponent);  // |x| in [2^(e−1), 2^e)
    const int last = (exponent - 1 < least ? least : exponent - 1) - fraction;
    const double unit = std::ldexp(1.0, last), result = std::nearbyint(x / unit) * unit;  // ties to even
    return std::fabs(result) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : result;
}

void sixteen_bits() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {  // there and back
        const Float16 half{static_cast<uint16_t>(bits)};
        const BFloat16 brain{static_cast<uint16_t>(bits)};
        Float16 half_back;
        BFloat16 brain_back;
        narrow(widen(half), half_back);
        narrow(widen(brain), brain_back);
        CHECK(same(widen(half_back), widen(half)) && (widen(half) != widen(half) || half_back.bits == bits));
        CHECK(same(widen(brain_back), widen(brain)) && (widen(brain) != widen(brain) || brain_back.bits == bits));
    }
    const float bfloat_largest = from_bits(0x7f7f0000u);
    for (uint64_t bits = 0; bits < (1ull << 32); bits += 40503) {  // all over the floats
        const float x = from_bits(static_cast<uint32_t>(bits));
        if (x != x) continue;
        Float16 half;
        BFloat16 brain;
        narrow(x, half);
        narrow(x, brain);
        CHECK(widen(half) == rounded(x, 10, -14, 65504));
        CHECK(widen(brain) == rounded(x, 7, -126, bfloat_largest));
    }
    for (float tie : {1.00048828125f, 1.00146484375f, 65519.99f, 65520.f, 5.9604645e-8f, 2.9802322e-8f, 2.98024e-8f}) {
        Float16 half;
        narrow(tie, half);
        CHECK(widen(half) == rounded(tie, 10, -14, 65504));
    }
}

void rules() {
    CHECK(lerp(3.0, 7.0, 0.0) == 3.0 && lerp(3.0, 7.0, 1.0) == 7.0 && lerp(1e30, 1.0, 1.0) == 1.0);
    CHECK(std::fabs(lerp(3.0, 7.0, 0.25) - 4.0) < 1e-15);
    CHECK(std::fabs(moved(2.0, 0.5, 0.1, 0.01) - (2.0 - 0.1 * 0.5 - 0.01 * 2.0)) < 1e-15);
    CHECK(std::fabs(rms_scale(4.0, 100, false) * 4.0 / std::sqrt(100.0) - 0.2) < 1e-15);
    CHECK(rms_scale(4.0, 100, true) == 0 && rms_scale(0.0, 100, false) == 0);
    CHECK(trust_scale(1e-9, 1e-3) == 1.0 && trust_scale(-1.0, 1e-3) == 1.0);
    CHECK(std::fabs(trust_scale(4e-3, 1e-3) - 0.5) < 1e-15);

    double value = 1, m = 0, v = 0, want = 1, wm = 0, wv = 0;
    for (int step = 1; step <= 5; ++step) {
        const double g = 0.3 * step - 1;
        adam(adam_rule<double>(0.01, 0.9, 0.999, 1e-8, step), g, value, m, v);
        wm = 0.9 * wm + 0.1 * g;
        wv = 0.999 * wv + 0.001 * g * g;
        want -= 0.01 * (wm / (1 - std::pow(0.9, step))) / (std::sqrt(wv / (1 - std::pow(0.999, step))) + 1e-8);
        CHECK(std::fabs(value - want) < 1e-14);
    }
}

}  // namespace

int main() {
    sixteen_bits();
    rules();
    return check::failures() ? 1 : 0;
}
