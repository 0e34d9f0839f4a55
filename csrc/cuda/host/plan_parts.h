// What plan.cu, plan_theta.cu and plan_lambda.cu share.
#pragma once

#include <stdexcept>

#include "cuda/host/plan.h"
#include "cuda/launch.h"

namespace fishleg::cuda {

inline int64_t padded(int64_t columns) { return (columns + 3) / 4 * 4; }  // rows at multiples of 16 bytes

inline bool aligned(const float* base, int64_t ld) {
    return ld % 4 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
}

/// The device that the kernels go to, and the caller's afterwards.
class OnDevice {
public:
#if defined(FISHLEG_CUDA_ON_CPU)
    explicit OnDevice(int) {}
#else
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device) {
            check(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }
    ~OnDevice() {
        if (changed_) {
            cudaSetDevice(before_);
        }
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
#endif
};

/// Pointers that kernels will follow, unless the block is empty.
inline void require(const BlockLayout& b, const void* pointer, const char* what) {
    if (!pointer && b.m * b.n > 0) {
        throw std::invalid_argument("block '" + b.name + "': " + what + " has no memory");
    }
}

template <class T>
T* at(int64_t workspace, int64_t offset) {
    return reinterpret_cast<T*>(workspace + offset);
}

inline Product product(const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t M,
                       int64_t N, int64_t K, Layout layout = Layout::nn) {
    Product p{};
    p.operands[0] = {A, static_cast<int32_t>(lda), aligned(A, lda)};
    p.operands[1] = {B, static_cast<int32_t>(ldb), aligned(B, ldb)};
    p.C = C, p.ldc = static_cast<int32_t>(ldc);
    p.M = static_cast<int32_t>(M), p.N = static_cast<int32_t>(N), p.K = static_cast<int32_t>(K);
    p.layout = layout;
    return p;
}

inline bool kronecker(const BlockLayout& b) { return b.kind == Kind::kron || b.kind == Kind::scaled_kron; }

}  // namespace fishleg::cuda
