// Whether tensors lie as CUDA kernels need them.
#pragma once

#include <string>
#include <vector>

#include "bindings/tensors.h"
#include "cuda/tables.h"

namespace fishleg {

/// Whether a tensor has this shape and lies so. ``first_row``: it may have other rows before and behind; -1: it has not.
inline bool lies(const TensorView& t, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                 cuda::Type type, int64_t first_row = -1) {
    const bool same = type == cuda::Type::f32    ? t.is(code_float, 32)
                      : type == cuda::Type::bf16 ? t.is(code_bfloat, 16)
                                                 : t.is(code_float, 16);
    if (!same || t.ndim != static_cast<int32_t>(shape.size())) {
        return false;
    }
    for (int32_t d = 0; d < t.ndim; ++d) {
        const bool fits = d == 0 && first_row >= 0 ? t.shape[0] >= first_row + shape[0] : t.shape[d] == shape[d];
        if (!fits || (shape[d] != 1 && t.strides[d] != strides[d])) {
            return false;
        }
    }
    return true;
}

/// Looks at items of lists on one device.
class TensorChecks {
public:
    explicit TensorChecks(int device) : device_(device) {}

protected:
    static pybind11::handle item(const pybind11::list& tensors, size_t i) {
        return PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    }

    static pybind11::list copied(const pybind11::list& tensors) {
        return pybind11::reinterpret_steal<pybind11::list>(
            PyList_GetSlice(tensors.ptr(), 0, PyList_GET_SIZE(tensors.ptr())));
    }

    static void check(const pybind11::list& tensors, size_t count, const char* what) {
        if (pybind11::len(tensors) != count) {
            throw std::invalid_argument("this plan needs " + std::to_string(count) + " " + what + " but there are " +
                                        std::to_string(pybind11::len(tensors)));
        }
    }

    bool mine(const TensorView& t) const {
#if defined(FISHLEG_CUDA_ON_CPU)
        return t.device_type == device_cpu;
#else
        return t.device_type == device_cuda && t.device_id == device_;
#endif
    }

    bool here(pybind11::handle tensor, TensorView& t) const { return view_of(tensor, t) && mine(t); }

    bool optional_dense(pybind11::handle tensor, int64_t count, std::vector<int64_t>& to) const {
        if (!tensor.is_none()) {
            return dense(tensor, count, to);
        }
        to.push_back(0);
        return true;
    }

    /// float32 without gaps. ``as_operator``: as one of five numbers each block, but for A.
    bool dense(pybind11::handle tensor, int64_t count, std::vector<int64_t>& to, bool as_operator = false) const {
        TensorView t;
        if (!here(tensor, t) || !t.is(code_float, 32) || t.count() != count || !t.contiguous()) {
            return false;
        }
        to.push_back(t.address());
        if (as_operator) {
            to.insert(to.end(), {0, 0, 0});
        }
        return true;
    }

private:
    int device_;
};

}  // namespace fishleg
