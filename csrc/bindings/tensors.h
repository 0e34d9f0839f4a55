// Where torch's tensors are and how they lie, by DLPack's C exchange API: no headers of torch, and a fraction of what the
// same costs from Python. The structures are those of DLPack 1.3 (dmlc/dlpack, include/dlpack/dlpack.h).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

namespace fishleg {

constexpr int32_t device_cpu = 1, device_cuda = 2;   // kDLCPU, kDLCUDA
constexpr uint8_t code_float = 2, code_bfloat = 4;  // kDLFloat, kDLBfloat

/// DLTensor.
struct TensorView {
    char* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t* shape;
    int64_t* strides;  // in entries
    uint64_t byte_offset;

    bool is(uint8_t wanted_code, int wanted_bits) const { return code == wanted_code && bits == wanted_bits; }
    int64_t address() const { return reinterpret_cast<int64_t>(data + byte_offset); }
    int64_t count() const {
        int64_t product = 1;
        for (int d = 0; d < ndim; ++d) {
            product *= shape[d];
        }
        return product;
    }
    /// Whether its entries follow one another, row by row.
    bool contiguous() const {
        int64_t run = 1;
        for (int d = ndim; d-- > 0; run *= shape[d]) {
            if (shape[d] != 1 && strides[d] != run) {
                return count() == 0;
            }
        }
        return true;
    }
};

/// DLPackExchangeAPI.
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void *allocate, *managed_from, *managed_to;
    int (*view_of)(void* tensor, TensorView* out);
    void* current_stream;
};

inline const ExchangeApi& exchange_api() {
    static const ExchangeApi* const found = [] {
        namespace py = pybind11;
        const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
        auto* api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        while (api && api->major > 1) {
            api = api->previous;
        }
        if (!api || api->major != 1) {
            PyErr_Clear();
            throw std::runtime_error("torch does not tell where tensors are by DLPack 1: use another version of torch");
        }
        return api;
    }();
    return *found;
}

/// False where it is not a tensor, or one without memory that strides could describe.
inline bool view_of(pybind11::handle tensor, TensorView& out) {
    static PyObject* const tensors = pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release().ptr();
    if (!PyObject_TypeCheck(tensor.ptr(), reinterpret_cast<PyTypeObject*>(tensors))) {
        return false;
    }
    if (exchange_api().view_of(tensor.ptr(), &out) != 0) {
        PyErr_Clear();
        return false;
    }
    return true;
}

}  // namespace fishleg
