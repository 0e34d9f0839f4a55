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

/// Goes through attributes that a plan depends on, while ``visit`` (borrowed object) is true: of each block itself, then
/// of its structure, then what its lists and dicts hold. Blocks come first, so that the order tells all apart.
template <class Visit>
bool objects_of(const pybind11::list& blocks, bool learning, Visit&& visit) {
    namespace py = pybind11;
    const auto interned = [](const char* name) { return PyUnicode_InternFromString(name); };
    static PyObject* const structure_name = interned("structure");
    static PyObject* const of_block[] = {interned("momentum"), interned("step"), interned("spectral")};
    static PyObject* const of_structure[] = {interned("precision")};
    static PyObject* const lists[] = {interned("groups"), interned("params")};
    static PyObject* const aux_name = interned("fishleg_aux");
    static PyObject* const when_learning[] = {interned("exp_avg"), interned("exp_avg_sq")};
    static PyObject* const counter_name = interned("aux_step");
    const auto get = [](PyObject* object, PyObject* name) {
        auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
        if (!found) {
            throw py::error_already_set();
        }
        return found;
    };
    const auto items = [&](const py::object& found) {
        if (PyDict_CheckExact(found.ptr())) {
            PyObject *key, *value;
            for (Py_ssize_t at = 0; PyDict_Next(found.ptr(), &at, &key, &value);) {
                if (!visit(value)) {
                    return false;
                }
            }
            return true;
        }
        for (const py::handle item : found) {
            if (!visit(item.ptr())) {
                return false;
            }
        }
        return true;
    };
    for (const py::handle handle : blocks) {
        PyObject* const block = handle.ptr();
        const py::object structure = get(block, structure_name);
        if (!visit(structure.ptr())) {
            return false;
        }
        for (PyObject* const name : of_block) {
            if (!visit(get(block, name).ptr())) {
                return false;
            }
        }
        for (PyObject* const name : of_structure) {
            if (!visit(get(structure.ptr(), name).ptr())) {
                return false;
            }
        }
        for (PyObject* const name : lists) {
            if (!items(get(block, name))) {
                return false;
            }
        }
        const py::object aux = get(structure.ptr(), aux_name);  // λ's own dict too: of its tensors there may be others
        if (!visit(aux.ptr()) || !items(aux)) {
            return false;
        }
        if (learning) {  // Adam's moments and counters, which rows point to as they do to λ
            for (PyObject* const name : when_learning) {
                if (!items(get(block, name))) {
                    return false;
                }
            }
            if (!visit(get(block, counter_name).ptr())) {
                return false;
            }
        }
    }
    return true;
}

/// All of them, in one list.
inline pybind11::list objects(const pybind11::list& blocks, bool learning) {
    pybind11::list found;
    objects_of(blocks, learning, [&](PyObject* object) {
        if (PyList_Append(found.ptr(), object) != 0) {
            throw pybind11::error_already_set();
        }
        return true;
    });
    return found;
}

/// Whether they are the very objects of a list.
inline bool has_objects(const pybind11::list& blocks, bool learning, const pybind11::list& known) {
    const Py_ssize_t count = PyList_GET_SIZE(known.ptr());
    Py_ssize_t at = 0;
    const bool all = objects_of(blocks, learning, [&](PyObject* object) {
        return at < count && PyList_GET_ITEM(known.ptr(), at++) == object;
    });
    return all && at == count;
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
