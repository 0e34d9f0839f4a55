// Lists of Python objects that are gone through at every step.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fishleg {

/// All that is in an attribute of each object, a list or a dict's values, in one list.
inline pybind11::list flattened(const pybind11::list& objects, const pybind11::str& name) {
    namespace py = pybind11;
    py::list all;
    const auto append = [&](PyObject* object) {
        if (PyList_Append(all.ptr(), object) != 0) {
            throw py::error_already_set();
        }
    };
    for (const py::handle object : objects) {
        const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name.ptr()));
        if (!found) {
            throw py::error_already_set();
        }
        if (PyDict_CheckExact(found.ptr())) {
            PyObject *key, *value;
            for (Py_ssize_t at = 0; PyDict_Next(found.ptr(), &at, &key, &value);) {
                append(value);
            }
        } else {
            for (const py::handle item : found) {
                append(item.ptr());
            }
        }
    }
    return all;
}

/// Whether they have the same objects in the same order.
inline bool identical(const pybind11::list& some, const pybind11::list& others) {
    const Py_ssize_t count = PyList_GET_SIZE(some.ptr());
    if (count != PyList_GET_SIZE(others.ptr())) {
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (PyList_GET_ITEM(some.ptr(), i) != PyList_GET_ITEM(others.ptr(), i)) {
            return false;
        }
    }
    return true;
}

/// Tensors' counters of what was written to them.
class Versions {
public:
    /// Whether any differs from what it was at the latest call, or this is the first.
    bool moved(const pybind11::list& tensors) {
        static PyObject* const name = PyUnicode_InternFromString("_version");
        const size_t count = pybind11::len(tensors);
        bool any = count != kept_.size() || !known_;
        kept_.resize(count), known_ = true;
        for (size_t i = 0; i < count; ++i) {
            PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
            const auto version = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(tensor, name));
            const int64_t now = version ? PyLong_AsLongLong(version.ptr()) : -1;
            if (PyErr_Occurred()) {
                known_ = false;
                throw pybind11::error_already_set();
            }
            any = any || now != kept_[i];
            kept_[i] = now;
        }
        return any;
    }
    void forget() { known_ = false; }

private:
    std::vector<int64_t> kept_;
    bool known_ = false;
};

}  // namespace fishleg
