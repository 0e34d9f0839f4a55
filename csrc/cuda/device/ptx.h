// The PTX instructions of the kernels, each with a host emulation beside it: nothing else here is hardware.
//
// Fragments of a warp's 16×8 product, for lane = 4g + t (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "… k16"):
//   C        c0 (g, 2t)  c1 (g, 2t+1)  c2 (g+8, 2t)  c3 (g+8, 2t+1)
//   A tf32   a0 (g, t)   a1 (g+8, t)   a2 (g, t+4)   a3 (g+8, t+4)           as (row, k)
//   B tf32   b0 (t, g)   b1 (t+4, g)                                         as (k, column)
//   A bf16   a0 (g, 2t)  a1 (g+8, 2t)  a2 (g, 2t+8)  a3 (g+8, 2t+8)          each with its neighbour k+1 in the upper half
//   B bf16   b0 (2t, g)  b1 (2t+8, g)
#pragma once

#include "cuda/device/device.h"

namespace fishleg::cuda {

#if defined(FISHLEG_CUDA_ON_CPU)

/// To 10 bits of fraction, ties away from zero; the other 13 are left out by the product.
inline uint32_t to_tf32(float x) { return x - x == 0 ? (bits_of(x) + 0x1000u) & 0xffffe000u : bits_of(x); }

inline uint32_t pack_bf16(float low, float high) {
    BFloat16 l, h;
    narrow(low, l);
    narrow(high, h);
    return static_cast<uint32_t>(l.bits) | static_cast<uint32_t>(h.bits) << 16;
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto* all = emulation::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r / 2), column = 2 * t + r % 2;
        float sum = 0;
        for (int k = 0; k < 8; ++k) {
            const uint32_t x = all[4 * (row % 8) + k % 4][row / 8 + 2 * (k / 4)];
            const uint32_t y = all[4 * column + k % 4][4 + k / 4];
            sum += from_bits(x & 0xffffe000u) * from_bits(y & 0xffffe000u);
        }
        c[r] += sum;
    }
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto* all = emulation::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int lane = emulation::lane(), g = lane / 4, t = lane % 4;
    const auto half = [](uint32_t pair, int upper) { return from_bits(upper ? pair & 0xffff0000u : pair << 16); };
    for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r / 2), column = 2 * t + r % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) {
            const uint32_t x = all[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)];
            const uint32_t y = all[4 * column + k % 8 / 2][4 + k / 8];
            sum += half(x, k % 2) * half(y, k % 2);
        }
        c[r] += sum;
    }
}

/// 16 or 4 bytes to shared memory, the last 16 − ``bytes`` (4 − ``bytes``) of them zero.
inline void copy_16(float* to, const float* from, int bytes) {
    for (int i = 0; i < 4; ++i) {
        to[i] = 4 * i < bytes ? from[i] : 0.0f;
    }
}
inline void copy_4(float* to, const float* from, int bytes) { *to = bytes ? *from : 0.0f; }
inline void commit_copies() {}
template <int pending>
inline void await_copies() {}

#else

__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void copy_16(float* to, const float* from, int bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_4(float* to, const float* from, int bytes) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

}  // namespace fishleg::cuda
