// The rules of the θ step and of Adam on λ, element by element: the one place for CPU and CUDA kernels.
//
// They are those of the reference backend (fishleg_fast/backends/reference), which the tests hold them against. T is λ's
// type: float or double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FISHLEG_INLINE __host__ __device__ __forceinline__
#else
#define FISHLEG_INLINE static inline
#endif

namespace fishleg {

using std::pow;
using std::sqrt;

constexpr double rms = 0.2;  // of a normalised update

// --- 16-bit numbers, as bits ----------------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

FISHLEG_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

FISHLEG_INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FISHLEG_INLINE float widen(float x) { return x; }
FISHLEG_INLINE double widen(double x) { return x; }
FISHLEG_INLINE float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
FISHLEG_INLINE float widen(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
    if (exponent == 0) {  // subnormal: units of 2⁻²⁴
        const float size = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    return from_bits(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}

/// To the nearest, ties to even; not a number stays one.
FISHLEG_INLINE void narrow(float x, float& out) { out = x; }
FISHLEG_INLINE void narrow(double x, double& out) { out = x; }
FISHLEG_INLINE void narrow(float x, BFloat16& out) {
    const uint32_t bits = bits_of(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    out.bits = static_cast<uint16_t>(x == x ? rounded >> 16 : 0x7fc0u);
}
FISHLEG_INLINE void narrow(float x, Float16& out) {
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, size = bits_of(x) & 0x7fffffffu;
    uint32_t magnitude;
    if (size > 0x7f800000u) {
        magnitude = 0x7e00u;  // not a number
    } else if (size >= 0x477ff000u) {
        magnitude = 0x7c00u;  // 65520 and above round to infinity
    } else if (size < 0x38800000u) {
        magnitude = bits_of(from_bits(size) + 0.5f) - bits_of(0.5f);  // subnormal: 0.5 has its last bit at 2⁻²⁴
    } else {
        magnitude = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | magnitude);
}

// --- θ step ---------------------------------------------------------------------------------------------------------

/// a + w (b − a), written without a branch (loops over it become vectors) and exact where w is 0 or 1.
template <class T>
FISHLEG_INLINE T lerp(T a, T b, T w) {
    return w * b + (T(1) - w) * a;
}

/// θ − lr·(c·nat + wd·θ), with move = lr·c and decay = lr·wd.
template <class T>
FISHLEG_INLINE T moved(T theta, T nat, T move, T decay) {
    return theta - (move * nat + decay * theta);
}

/// c of normalize="rms", which makes a block's root-mean-square 0.2: 0 where its gradient, or nat, is all zero.
FISHLEG_INLINE double rms_scale(double norm, int64_t count, bool gradient_is_zero) {
    return gradient_is_zero || norm == 0 ? 0.0 : rms * sqrt(static_cast<double>(count)) / norm;
}

/// What multiplies a full polar factor, whose root-mean-square it makes 0.2: 0 where its gradient, or nat, is all zero.
FISHLEG_INLINE double polar_scale(double norm, int64_t longest, bool gradient_is_zero) {
    return gradient_is_zero || norm == 0 ? 0.0 : rms * sqrt(static_cast<double>(longest));
}

/// c of normalize="trust", one for all blocks: ``power`` is Σ lr₀² m̂ᵀ nat.
FISHLEG_INLINE double trust_scale(double power, double kappa) {
    constexpr double tiny = 1.17549435e-38;  // float32's, as the reference has it
    const double c = sqrt(kappa / (power > tiny ? power : tiny));
    return c < 1 ? c : 1.0;
}

// --- Adam on λ ------------------------------------------------------------------------------------------------------

/// What one Adam step has in common for all entries of a tensor.
template <class T>
struct Adam {
    T weight1;    // 1 − β₁
    T beta2;
    T step_size;  // lr / (1 − β₁ᵗ)
    T root_bias;  // √(1 − β₂ᵗ)
    T eps;
};

/// ``step`` counts from 1: this step's.
template <class T>
FISHLEG_INLINE Adam<T> adam_rule(double lr, double beta1, double beta2, double eps, double step) {
    return {T(1 - beta1), T(beta2), T(lr / (1 - pow(beta1, step))), T(sqrt(1 - pow(beta2, step))), T(eps)};
}

template <class T>
FISHLEG_INLINE void adam(const Adam<T>& rule, T grad, T& value, T& exp_avg, T& exp_avg_sq) {
    exp_avg = lerp(exp_avg, grad, rule.weight1);
    exp_avg_sq = rule.beta2 * exp_avg_sq + (T(1) - rule.beta2) * grad * grad;
    value -= rule.step_size * exp_avg / (sqrt(exp_avg_sq) / rule.root_bias + rule.eps);
}

}  // namespace fishleg
